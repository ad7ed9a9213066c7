"""Rows of a padded vocabulary that engines never sample: training and score are as if the policy did not have them."""

from dataclasses import replace

import pytest
import torch

from drafter.eagle.draft_loss import LossOptions, draft_loss
from drafter.eagle.expected_acceptance import expected_acceptance
from drafter.eagle.head import EagleHead
from drafter.eagle.packed_rows import FrozenPolicy, PackedFeatures
from drafter.eagle.vocabulary import DraftVocabulary
from tests.drafter.policies import random_policy, random_row, small_config

VOCAB, LIMIT, STEPS = 24, 19, 4
REDUCED = torch.tensor([0, 1, 2, 4, 5, 8, 9, 11, 12, 13, 14, 17, 20, 22, 23])


def pair_of_heads(kind: str, reduced: bool) -> tuple[EagleHead, EagleHead]:
    """A head for the padded vocabulary, and one for the cut vocabulary with the same weights."""
    ids = REDUCED if reduced else torch.arange(VOCAB)
    below = ids[ids < LIMIT]
    torch.manual_seed(0)
    padded = EagleHead(small_config(kind, draft_vocab_size=len(ids)), DraftVocabulary(ids, VOCAB))
    config = small_config(kind, vocab_size=LIMIT, draft_vocab_size=len(below))
    cut = EagleHead(config, DraftVocabulary(below, LIMIT))
    weights = {name: value for name, value in padded.named_parameters() if name != "lm_head.weight"}
    if kind == "eagle3":
        weights["lm_head.weight"] = padded.lm_head.weight[: len(below)]
    cut.load_state_dict(weights, strict=False)
    return padded, cut


def pair_of_policies(padded: EagleHead) -> tuple[FrozenPolicy, FrozenPolicy]:
    whole = random_policy(padded.config)
    lm_head = 0.3 * whole.lm_head[:LIMIT]
    return FrozenPolicy(whole.embedding, lm_head), FrozenPolicy(whole.embedding[:LIMIT], lm_head)


def row_for(head: EagleHead) -> PackedFeatures:
    row = random_row(head.config, [14, 9], prompt=3)
    return replace(row, token_ids=row.token_ids % LIMIT)


FORMS = pytest.mark.parametrize(("kind", "reduced"), [("eagle3", False), ("eagle3", True), ("eagle", False)])


@FORMS
def test_the_loss_is_that_of_a_policy_with_a_cut_vocabulary(kind: str, reduced: bool) -> None:
    padded, cut = pair_of_heads(kind, reduced)
    policy, cut_policy = pair_of_policies(padded)
    options = LossOptions(steps=STEPS, hidden=0.5 if kind == "eagle" else 0.0)
    loss = draft_loss(padded, row_for(padded), policy, options)
    expected = draft_loss(cut, row_for(padded), cut_policy, options)
    assert expected.weight > 5
    torch.testing.assert_close(vars(loss), vars(expected))
    loss.total.backward()
    expected.total.backward()
    own = dict(cut.named_parameters())
    for name, parameter in padded.named_parameters():
        rows = len(own[name])
        torch.testing.assert_close(parameter.grad[:rows], own[name].grad, msg=name)
        assert not parameter.grad[rows:].any(), "what is masked learns nothing"


@FORMS
def test_the_expected_length_is_that_of_a_policy_with_a_cut_vocabulary(kind: str, reduced: bool) -> None:
    padded, cut = pair_of_heads(kind, reduced)
    policy, cut_policy = pair_of_policies(padded)
    found = expected_acceptance(padded, row_for(padded), policy, STEPS, temperature=0.8)
    expected = expected_acceptance(cut, row_for(padded), cut_policy, STEPS, temperature=0.8)
    torch.testing.assert_close(vars(found), vars(expected))
    assert found.expected_length > 1


def test_what_the_head_puts_on_masked_tokens_does_not_matter() -> None:
    head, _ = pair_of_heads("eagle3", reduced=True)
    policy, _ = pair_of_policies(head)
    row = row_for(head)
    before = expected_acceptance(head, row, policy, STEPS).expected_length
    with torch.no_grad():
        head.lm_head.weight[-3:] *= 50  # the ids 20, 22, 23
    assert expected_acceptance(head, row, policy, STEPS).expected_length == before


def test_a_prompt_may_hold_tokens_that_are_never_sampled() -> None:
    head, _ = pair_of_heads("eagle3", reduced=False)
    policy, _ = pair_of_policies(head)
    row = row_for(head)
    row.token_ids[1] = LIMIT + 2
    assert expected_acceptance(head, row, policy, STEPS).reached[0] == 10 + 5
    assert draft_loss(head, row, policy, LossOptions(steps=STEPS)).step_counts[0] == 10 + 5


def test_a_new_head_starts_from_the_rows_that_there_are() -> None:
    head, _ = pair_of_heads("eagle3", reduced=True)
    policy, _ = pair_of_policies(head)
    head.copy_policy_head(policy.lm_head)
    below = REDUCED[REDUCED < LIMIT]
    assert torch.equal(head.lm_head.weight[: len(below)], policy.lm_head[below])
