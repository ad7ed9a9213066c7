"""Which hidden state goes with which token: hidden states that say their own token, and a rule for the next one.

The synthetic policy continues with `next_token[x]` after token x. Its hidden states at a position are a code of the
token there, so a head can learn the rule, several tokens ahead, exactly if embeddings, features and targets are paired
as they will be in use. Where a test plants a shift by one, it has to notice.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from drafter.eagle.draft_loss import LossOptions, unroll
from drafter.eagle.expected_acceptance import expected_acceptance
from drafter.eagle.head import EagleHead
from drafter.eagle.packed_rows import FrozenPolicy, PackedFeatures, counted_drafts, to_anchors, to_target_positions
from tests.drafter.policies import cumulative, greedy_drafts, small_config, train

VOCAB = 24
ORDER = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(3))
NEXT_TOKEN = torch.empty_like(ORDER).index_put((ORDER,), ORDER.roll(-1))  # one cycle: no token comes again soon
CODES = torch.randn(VOCAB, 32, generator=torch.Generator().manual_seed(5))
STEPS = 4


def synthetic(kind: str, lengths: list[int], padding: int = 0, seed: int = 0) -> tuple[PackedFeatures, FrozenPolicy]:
    """Sequences that follow the rule from random first tokens."""
    generator = torch.Generator().manual_seed(seed)
    tokens = []
    for length in lengths:
        token = torch.randint(VOCAB, (1,), generator=generator)
        for _ in range(length):
            tokens.append(token)
            token = NEXT_TOKEN[token]
    token_ids = torch.cat([*tokens, torch.randint(VOCAB, (padding,), generator=generator)])
    # The final hidden state of x picks the row of NEXT_TOKEN[x] of the policy's head, nearly surely.
    final = F.normalize(CODES, dim=-1)[token_ids] * 12
    lm_head = torch.zeros(VOCAB, 32)
    lm_head[NEXT_TOKEN] = F.normalize(CODES, dim=-1) * 2
    features = PackedFeatures(
        token_ids=token_ids,
        hidden_states=torch.cat([CODES[token_ids]] * 3, dim=-1) if kind == "eagle3" else final,
        final_hidden=final,
        response_mask=torch.cat([torch.arange(length) >= 2 for length in lengths] + [torch.zeros(padding) > 0]),
        cu_seqlens=cumulative(lengths),
    )
    embedding = torch.randn(VOCAB, 32, generator=torch.Generator().manual_seed(6))
    return features, FrozenPolicy(embedding, lm_head)


def shifted(features: PackedFeatures, what: str) -> PackedFeatures:
    """One of the pairings wrong by one position."""
    return features if what == "none" else replace(features, **{what: getattr(features, what).roll(1, dims=0)})


def right_proposals(head: EagleHead, features: PackedFeatures, policy: FrozenPolicy) -> Tensor:
    """[steps, seq]: whether the proposal of each step is what the rule says, given the head's own proposals before."""
    drafts = greedy_drafts(head, features, policy, STEPS)
    expected, right = features.token_ids.roll(-1), []
    for step in range(STEPS):
        expected = NEXT_TOKEN[expected]
        right.append(drafts[:, step] == expected)
    return torch.stack(right)


@pytest.mark.parametrize("kind", ["eagle3", "eagle"])
@pytest.mark.parametrize("what", ["none", "final_hidden"])
def test_a_head_learns_the_rule_several_tokens_ahead_from_packed_rows(kind: str, what: str) -> None:
    lengths = [9, 5, 14, 7]
    torch.manual_seed(0)
    head = EagleHead(small_config(kind))
    rows = [synthetic(kind, lengths, padding=3, seed=seed)[0] for seed in range(40)]
    policy = synthetic(kind, lengths)[1]
    options = LossOptions(steps=STEPS, hidden=1.0 if kind == "eagle" else 0.0)
    train(head, lambda step: shifted(rows[step % 40], what), policy, 120, options, lr=5e-3)

    held_out = synthetic(kind, [11, 6, 13], padding=2, seed=100)[0]
    counted = counted_drafts(held_out.response_mask, held_out.cu_seqlens, STEPS)
    right = right_proposals(head, held_out, policy)[counted].float().mean()
    acceptance = expected_acceptance(head, held_out, policy, STEPS)
    if what == "none":
        assert right > 0.97
        assert acceptance.expected_length > 0.95 * (STEPS + 1)
        assert acceptance.per_position.min() > 0.9
    else:
        assert right < 0.5
        assert acceptance.expected_length < 2


@pytest.mark.parametrize("what", ["none", "hidden_states", "token_ids"])
def test_step_i_pairs_the_features_of_p_with_token_p_plus_1_plus_i(what: str) -> None:
    features, policy = synthetic("eagle3", [7, 4, 9], padding=2)
    head = EagleHead(small_config("eagle3"))
    states, embeddings = [], []
    head.midlayer.hidden_norm.register_forward_hook(lambda _, inputs, __: states.append(inputs[0]))
    head.midlayer.input_layernorm.register_forward_hook(lambda _, inputs, __: embeddings.append(inputs[0]))
    unroll(head, shifted(features, what), policy, STEPS)
    codes = torch.cat([CODES] * 3, dim=-1)
    token = torch.cdist(states[0], head.fuse(codes)).argmin(dim=-1)  # the token that the features of p tell
    counted = counted_drafts(features.response_mask, features.cu_seqlens, STEPS)
    right = []
    for step in range(STEPS):
        token = NEXT_TOKEN[token]
        fed = torch.cdist(embeddings[step], policy.embedding).argmin(dim=-1)
        right.append(bool((token == fed)[counted[step]].all()))
    assert right == [what == "none"] * STEPS


def test_counted_drafts_are_those_that_an_engine_verifies() -> None:
    # Sequence 0: two prompt tokens, three of the response. Sequence 1: one and two. One of padding, wrongly marked.
    mask = torch.tensor([0, 0, 1, 1, 1, 0, 1, 1, 1]) > 0
    counted = counted_drafts(mask, cumulative([5, 3]), 3).int().tolist()
    assert counted == [
        [0, 1, 1, 0, 0, 1, 0, 0, 0],  # anchors 1 and 2 (newest token 2, 3) propose tokens 3 and 4; anchor 5 token 7
        [0, 1, 0, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 0, 0],
    ]


def test_a_tool_s_tokens_inside_a_response_end_the_drafts_before_them() -> None:
    mask = torch.tensor([0, 1, 1, 0, 0, 1, 1, 1]) > 0
    counted = counted_drafts(mask, cumulative([8]), 4).int().tolist()
    assert counted == [[1, 0, 0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 0, 0, 0], [0] * 8, [0] * 8]


def test_target_positions_and_anchors_are_inverse() -> None:
    values = torch.arange(3 * 7).view(3, 7)
    moved = to_target_positions(values)
    assert moved[2, 5] == values[2, 5 - 3]
    assert torch.equal(to_anchors(moved), values)
