"""The loss is a sum over sequences, whoever shares their row, and counts what it says."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from drafter.eagle.draft_loss import DraftLoss, LossOptions, draft_loss
from drafter.eagle.head import EagleHead
from drafter.eagle.packed_rows import FrozenPolicy, PackedFeatures
from drafter.eagle.vocabulary import DraftVocabulary
from tests.drafter.policies import pack, random_policy, random_row, small_config

VOCABULARY = DraftVocabulary(torch.tensor([0, 1, 2, 4, 5, 8, 9, 11, 12, 13, 14, 17, 20, 22, 23]), 24)


def make_head(kind: str, reduced: bool = False) -> EagleHead:
    torch.manual_seed(0)
    config = small_config(kind, draft_vocab_size=15) if reduced else small_config(kind)
    return EagleHead(config, VOCABULARY if reduced else None)


def gradients(head: EagleHead, losses: list[DraftLoss]) -> dict[str, Tensor]:
    head.zero_grad()
    for loss in losses:
        loss.total.backward()
    return {name: parameter.grad.clone() for name, parameter in head.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize(("kind", "reduced"), [("eagle3", False), ("eagle3", True), ("eagle", False)])
def test_a_packed_row_gives_the_sum_of_its_sequences_and_the_same_gradients(kind: str, reduced: bool) -> None:
    head = make_head(kind, reduced)
    policy = random_policy(head.config)
    options = LossOptions(steps=5, hidden=0.5 if kind == "eagle" else 0.0, rows_at_once=7)
    rows = [random_row(head.config, [length], prompt=length // 3, seed=length) for length in (12, 3, 17, 2, 9)]
    apart = [draft_loss(head, row, policy, options) for row in rows]
    packed = draft_loss(head, pack(rows, padding=4), policy, options)
    torch.testing.assert_close(packed.total, torch.stack([loss.total for loss in apart]).sum())
    torch.testing.assert_close(packed.weight, torch.stack([loss.weight for loss in apart]).sum())
    torch.testing.assert_close(packed.step_counts, torch.stack([loss.step_counts for loss in apart]).sum(dim=0))
    assert packed.weight > 10
    one, sum_of_all = gradients(head, [packed]), gradients(head, apart)
    assert one.keys() == sum_of_all.keys() == dict(head.named_parameters()).keys()
    for name, gradient in one.items():
        torch.testing.assert_close(gradient, sum_of_all[name], rtol=1e-4, atol=1e-5, msg=name)
        assert gradient.abs().max() > 0, name


def naive_loss(head: EagleHead, row: PackedFeatures, policy: FrozenPolicy, options: LossOptions) -> Tensor:
    """One sequence: every draft run alone, token by token, through a mask over everything fed so far."""
    length, total = len(row.token_ids), torch.zeros(())
    for anchor in range(length):
        for step in range(options.steps):
            proposed = anchor + 2 + step
            if proposed >= length or not row.response_mask[anchor + 1 : proposed + 1].all():
                break
            # The features up to the anchor alone, as an engine that has got so far.
            drafts = head.start(row.hidden_states[: anchor + 1], torch.tensor([0, anchor + 1]))
            for i in range(step + 1):
                states = drafts.step(policy.embedding[row.token_ids[1 + i : anchor + 2 + i]])
            state, goal = states[anchor], row.final_hidden[anchor + 1 + step]
            logits = policy.lm_head @ goal
            if not head.t2d[logits.argmax()]:
                continue
            target = logits[head.token_ids].softmax(dim=-1)
            entropy = -(target * head.logits(state, policy.lm_head).log_softmax(dim=-1)).sum()
            loss = options.cross_entropy * entropy + options.hidden * F.smooth_l1_loss(state, goal)
            total = total + options.decay**step * loss
    return total


@pytest.mark.parametrize(("kind", "reduced"), [("eagle3", True), ("eagle", False)])
def test_it_is_the_loss_of_drafts_run_one_by_one(kind: str, reduced: bool) -> None:
    head = make_head(kind, reduced)
    policy, row = random_policy(head.config), random_row(head.config, [13], prompt=4)
    options = LossOptions(steps=4, decay=0.7, cross_entropy=0.3, hidden=1.0 if kind == "eagle" else 0.0)
    torch.testing.assert_close(draft_loss(head, row, policy, options).total, naive_loss(head, row, policy, options))


@pytest.mark.parametrize("rows_at_once", [1, 5, 1000])
def test_the_chunks_of_logits_change_nothing(rows_at_once: int) -> None:
    head = make_head("eagle3", reduced=True)
    policy, row = random_policy(head.config), random_row(head.config, [11, 8])
    whole = draft_loss(head, row, policy, LossOptions(rows_at_once=19))
    expected = gradients(head, [whole])
    rows: list[int] = []
    head.lm_head.register_forward_hook(lambda _, inputs, __: rows.append(inputs[0].shape[1]))
    parts = draft_loss(head, row, policy, LossOptions(rows_at_once=rows_at_once))
    torch.testing.assert_close(parts.total, whole.total)
    for name, gradient in gradients(head, [parts]).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5)
    assert max(rows) <= rows_at_once


def changed(row: PackedFeatures, positions: slice, names: tuple[str, ...]) -> PackedFeatures:
    values = {}
    for name in names:
        values[name] = getattr(row, name).clone()
        values[name][positions] = 1 if name == "token_ids" else 50.0
    return replace(row, **values)


EVERYTHING = ("token_ids", "hidden_states", "final_hidden")


def test_what_does_not_count_has_no_influence() -> None:
    head = make_head("eagle3")
    policy = random_policy(head.config)
    # A sequence with a response of six tokens behind a prompt of four, then one that is all prompt, then padding.
    row = pack([random_row(head.config, [10], prompt=4), random_row(head.config, [6], prompt=6, seed=1)], padding=3)
    loss = draft_loss(head, row, policy)
    expected = gradients(head, [loss])
    same = [
        changed(row, slice(10, 16), EVERYTHING),  # the sequence without a response
        changed(row, slice(16, 19), EVERYTHING),  # padding
        changed(row, slice(0, 4), ("final_hidden",)),  # what the policy expects inside the prompt
        changed(row, slice(9, 10), ("hidden_states", "final_hidden")),  # past the last token that can be proposed
    ]
    for other in same:
        again = draft_loss(head, other, policy)
        assert torch.equal(again.total, loss.total)
        for name, gradient in gradients(head, [again]).items():
            assert torch.equal(gradient, expected[name]), name
    counts = [changed(row, slice(0, 1), ("hidden_states",)), changed(row, slice(4, 5), ("final_hidden",))]
    assert all(draft_loss(head, other, policy).total != loss.total for other in counts)


def test_steps_are_weighted_by_the_decay() -> None:
    head = make_head("eagle3")
    loss = draft_loss(
        head, random_row(head.config, [12, 9]), random_policy(head.config), LossOptions(steps=3, decay=0.5)
    )
    weights = torch.tensor([1.0, 0.5, 0.25])
    assert loss.step_counts.tolist() == [8 + 5 + 2, 7 + 4 + 2, 6 + 3 + 2]
    torch.testing.assert_close(loss.weight, (weights * loss.step_counts).sum())
    torch.testing.assert_close(loss.total.detach(), (weights * loss.step_cross_entropy).sum())


def test_places_whose_likeliest_token_cannot_be_proposed_are_left_out() -> None:
    head = make_head("eagle3", reduced=True)
    row = random_row(head.config, [40], prompt=1)
    policy = random_policy(head.config)
    likeliest = (row.final_hidden @ policy.lm_head.T).argmax(dim=-1)
    possible = torch.isin(likeliest, VOCABULARY.token_ids)
    loss = draft_loss(head, row, policy, LossOptions(steps=1))
    assert 0 < loss.step_counts[0] == possible[1:39].sum() < 38


def test_an_eagle3_head_has_no_distance_to_hidden_states() -> None:
    head = make_head("eagle3")
    with pytest.raises(ValueError, match="for eagle heads only"):
        draft_loss(head, random_row(head.config, [5]), random_policy(head.config), LossOptions(hidden=1.0))


def test_a_row_without_responses_weighs_nothing_and_has_finite_gradients() -> None:
    head = make_head("eagle3")
    loss = draft_loss(head, random_row(head.config, [5, 1], prompt=5), random_policy(head.config))
    assert loss.weight == loss.total == 0
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients(head, [loss]).values())


@pytest.mark.parametrize("kind", ["eagle3", "eagle"])
def test_a_float32_head_learns_from_a_bfloat16_policy(kind: str) -> None:
    head = make_head(kind)
    policy, row = random_policy(head.config), random_row(head.config, [9])
    half = FrozenPolicy(policy.embedding.bfloat16(), policy.lm_head.bfloat16())
    rounded = replace(row, hidden_states=row.hidden_states.bfloat16(), final_hidden=row.final_hidden.bfloat16())
    loss = draft_loss(head, rounded, half)
    assert loss.total.dtype == torch.float32
    torch.testing.assert_close(loss.total, draft_loss(head, row, policy).total, rtol=0.05, atol=0)
    assert gradients(head, [loss]).keys() == dict(head.named_parameters()).keys()


def test_the_policy_gets_no_gradient() -> None:
    for kind in ("eagle3", "eagle"):
        head = make_head(kind)
        policy = random_policy(head.config)
        policy.embedding.requires_grad_()
        policy.lm_head.requires_grad_()
        draft_loss(head, random_row(head.config, [9]), policy).total.backward()
        assert policy.embedding.grad is None and policy.lm_head.grad is None


def test_the_head_can_start_from_the_policy_s_own_rows() -> None:
    head = make_head("eagle3", reduced=True)
    policy = random_policy(head.config)
    head.copy_policy_head(policy.lm_head)
    assert torch.equal(head.lm_head.weight, policy.lm_head[VOCABULARY.token_ids])
