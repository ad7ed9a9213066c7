"""Advantages and token losses of every family, against numbers worked out by hand."""

import math
from dataclasses import replace

import pytest
import torch

from megatron_rl.algorithms import PolicyTokens, grpo_advantages, load_algorithm, policy_objective, token_weights
from megatron_rl.config.algorithm import PRESETS, AlgorithmConfig

FROM_REWARDS = set(PRESETS) - {"ppo"}
GROUPS = torch.tensor([0, 0, 0, 1, 1, 1])
REWARDS = torch.tensor([1.0, 0.0, 0.0, 2.0, 2.0, 5.0], dtype=torch.float64)
LENGTHS = torch.tensor([1, 2, 1, 3, 0, 1])  # a single-token response, and an empty one
EQUAL = torch.tensor([0.1, 0.1, 0.1, 0.7, 0.7, 0.7], dtype=torch.float64)


def advantages(name, rewards=REWARDS, groups=GROUPS, lengths=LENGTHS, **settings):
    return load_algorithm(AlgorithmConfig(name=name, **settings)).advantages(rewards, groups, lengths)


def per_token(values):
    return [value for value, length in zip(values, LENGTHS.tolist(), strict=True) for _ in range(length)]


@pytest.mark.parametrize("name", ["grpo", "dapo", "gspo", "cispo"])
def test_group_relative_advantages(name):
    # Group 0: mean 1/3, deviations 2/3, -1/3, -1/3, sample variance (4 + 1 + 1) / 9 / 2 = 1/3.
    # Group 1: mean 3, deviations -1, -1, 2, sample variance (1 + 1 + 4) / 2 = 3.
    a, b = math.sqrt(1 / 3), math.sqrt(3)
    expected = [2 / 3 / a, -1 / 3 / a, -1 / 3 / a, -1 / b, -1 / b, 2 / b]
    assert advantages(name).tolist() == pytest.approx(per_token(expected), rel=1e-5)


def test_grpo_is_bit_for_bit_what_its_function_gives():
    rewards = torch.rand(64, generator=torch.Generator().manual_seed(0))
    groups, lengths = torch.arange(64) // 8, torch.arange(64) % 5
    expected = grpo_advantages(rewards, groups, True).repeat_interleave(lengths)
    assert torch.equal(advantages("grpo", rewards, groups, lengths), expected)


def test_dr_grpo_does_not_divide():
    assert advantages("dr_grpo").tolist() == pytest.approx(per_token([2 / 3, -1 / 3, -1 / 3, -1, -1, 2]))


def test_rloo_leaves_one_out():
    # Group 0: 1 - (0 + 0) / 2 = 1; 0 - (1 + 0) / 2 = -1/2, twice.
    # Group 1: 2 - (2 + 5) / 2 = -3/2, twice; 5 - (2 + 2) / 2 = 3.
    assert advantages("rloo").tolist() == pytest.approx(per_token([1, -0.5, -0.5, -1.5, -1.5, 3]))


def test_rloo_of_a_published_example():
    # Figures of the documentation of modelscope's Twinkle (RLOOAdvantage): the first of [0, 1, 0, 1] has
    # 0 - mean(1, 0, 1) = -0.667; the others by the same rule, and the group [1, 0, 0, 0] has 1 and three times -1/3.
    rewards = torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    result = advantages("rloo", rewards, torch.arange(8) // 4, torch.ones(8, dtype=torch.long))
    assert result.tolist() == pytest.approx([-2 / 3, 2 / 3, -2 / 3, 2 / 3, 1, -1 / 3, -1 / 3, -1 / 3])


def test_reinforce_pp_normalizes_over_all_tokens():
    # Token rewards 1, 0 0, 0, 2 2 2, 5: mean 12 / 8 = 1.5; squared deviations 1/4, 3 x 9/4, 3 x 1/4, 49/4 add up to 20,
    # variance 20 / 8 = 2.5. The empty response has no token to count.
    s = math.sqrt(2.5)
    assert advantages("reinforce_pp").tolist() == pytest.approx(
        per_token([-0.5 / s, -1.5 / s, -1.5 / s, 0.5 / s, 0.5 / s, 3.5 / s])
    )


def test_reinforce_pp_baseline_subtracts_the_group_mean_first():
    # Token values 2/3, -1/3 -1/3, -1/3, -1 -1 -1, 2: sum -4/3, mean -1/6. Deviations 5/6, 3 x -1/6, 3 x -5/6, 13/6:
    # squares 25 + 3 + 75 + 169 = 272, / 36 / 8.
    s = math.sqrt(272 / 36 / 8)
    assert advantages("reinforce_pp_baseline").tolist() == pytest.approx(
        per_token([5 / 6 / s, -1 / 6 / s, -1 / 6 / s, -5 / 6 / s, -5 / 6 / s, 13 / 6 / s])
    )


@pytest.mark.parametrize("name", sorted(FROM_REWARDS - {"reinforce_pp"}))
def test_groups_with_equal_rewards_get_exactly_nothing(name):
    assert torch.equal(advantages(name, EQUAL), torch.zeros(8, dtype=torch.float64))


def test_reinforce_pp_has_nothing_to_say_only_when_all_rewards_are_equal():
    assert torch.equal(advantages("reinforce_pp", torch.full((6,), 0.1)), torch.zeros(8))
    # 0.1 for 4 tokens, 0.7 for 4: mean 0.4, deviation 0.3 for all.
    assert advantages("reinforce_pp", EQUAL).tolist() == pytest.approx([-1] * 4 + [1] * 4, rel=1e-5)


@pytest.mark.parametrize("name", sorted(FROM_REWARDS))
def test_a_step_without_a_token_has_no_advantages(name):
    assert advantages(name, lengths=torch.zeros(6, dtype=torch.long)).shape == (0,)


def _log(*values):
    return torch.tensor(values, dtype=torch.float64).log()


def make_tokens(ratios, values, lengths, kept=None, aggregation="seq-mean-token-mean"):
    """Tokens of probability 1/2 each before the update."""
    lengths = torch.tensor(lengths)
    old = _log(*[0.5] * len(ratios))
    new = (old + _log(*ratios)).requires_grad_()
    weights = token_weights(lengths, aggregation, None if kept is None else torch.tensor(kept)).double()
    return PolicyTokens(
        new_logprobs=new,
        entropy=torch.zeros_like(old),
        old_logprobs=old,
        importance=torch.ones_like(old),
        ref_logprobs=None,
        advantages=torch.tensor(values, dtype=torch.float64),
        weights=weights,
        lengths=lengths,
        total_tokens=int((weights > 0).sum()),
    )


def learn(name, tokens, **settings):
    """Loss, clipped share and gradient."""
    loss, metrics = policy_objective(tokens, load_algorithm(AlgorithmConfig(name=name, **settings)))
    (gradient,) = torch.autograd.grad(loss, tokens.new_logprobs)
    return loss.item(), metrics["clip_fraction"].item(), gradient.tolist()


def test_gspo_takes_the_geometric_mean_of_the_response():
    # Ratios 4 and 1: sqrt(4) = 2 for both tokens; a response of one token has its own, 1.5. No clipping up to 3.
    tokens = make_tokens([4.0, 1.0, 1.5], [1.0, 1.0, -2.0], [2, 1])
    loss, clipped, gradient = learn("gspo", tokens, clip_high=2.0)
    # Mean of the responses: (-2 * 1 + 1.5 * 2) / 2. Gradient by token: -s A / length / 2.
    assert (loss, clipped) == (pytest.approx(0.5), 0)
    assert gradient == pytest.approx([-2 / 4, -2 / 4, 1.5 * 2 / 2])


def test_gspo_clips_whole_responses():
    # s = 2 > 1.5 with A > 0: both tokens are clipped, though the second one's own ratio is 1. s = 1/2 < 0.8 with A < 0:
    # clipped at 0.8. s = 2 with A < 0: the minimum does not clip.
    tokens = make_tokens([4.0, 1.0, 0.5, 2.0], [1.0, 1.0, -1.0, -1.0], [2, 1, 1])
    loss, clipped, gradient = learn("gspo", tokens, clip_low=0.2, clip_high=0.5)
    assert loss == pytest.approx((-1.5 + 0.8 + 2.0) / 3)
    assert clipped == pytest.approx(3 / 4)
    assert gradient == pytest.approx([0, 0, 0, 2 / 3])


def test_gspo_leaves_rejected_tokens_out_of_the_mean():
    tokens = make_tokens([4.0, 1.0, 1.0], [1.0, 1.0, 1.0], [3], kept=[True, False, True])
    loss, _, gradient = learn("gspo", tokens, clip_high=2.0)
    assert loss == pytest.approx(-2.0)  # sqrt(4 * 1), not the third root
    assert gradient == pytest.approx([-1.0, 0, -1.0])


def test_gspo_is_the_objective_of_its_paper():
    """Value and gradient of equation 5, written out by autograd through the mean of log-ratios."""
    generator = torch.Generator().manual_seed(3)
    lengths = [3, 1, 0, 5]
    ratios = (torch.rand(9, generator=generator, dtype=torch.float64) + 0.5).tolist()
    values = torch.tensor([0.7, -1.2, 0.0, -0.4], dtype=torch.float64)
    tokens = make_tokens(ratios, values.repeat_interleave(torch.tensor(lengths)).tolist(), lengths)
    loss, _, gradient = learn("gspo", tokens, clip_low=0.05, clip_high=0.05)
    new = tokens.new_logprobs.detach().requires_grad_()
    parts = [part.mean() for part in (new - tokens.old_logprobs).split(lengths) if len(part)]
    s, a = torch.stack(parts).exp(), values[[0, 1, 3]]
    expected = -torch.minimum(s * a, s.clamp(0.95, 1.05) * a).mean()
    assert loss == pytest.approx(expected.item())
    assert gradient == pytest.approx(torch.autograd.grad(expected, new)[0].tolist())


def test_cispo_bounds_the_weight_and_keeps_the_gradient():
    # Weights: 2 stays, 8 becomes 5, 0.1 stays (no lower bound). Loss -w A log p', with p' = ratio / 2; mean over 3.
    ratios, values, weights = [2.0, 8.0, 0.1], [1.0, -1.0, 2.0], [2.0, 5.0, 0.1]
    tokens = make_tokens(ratios, values, [3], aggregation="token-mean")
    loss, clipped, gradient = learn("cispo", tokens)
    expected = [-w * a * math.log(r / 2) for w, a, r in zip(weights, values, ratios, strict=True)]
    assert loss == pytest.approx(sum(expected) / 3, rel=1e-6)
    assert clipped == pytest.approx(1 / 3)
    assert gradient == pytest.approx([-w * a / 3 for w, a in zip(weights, values, strict=True)], rel=1e-6)


def test_cispo_with_a_lower_bound():
    tokens = make_tokens([0.1], [2.0], [1], aggregation="token-mean")
    _, clipped, gradient = learn("cispo", tokens, clip_low=0.2)
    assert clipped == 1
    assert gradient == pytest.approx([-0.8 * 2.0])


def test_dapo_clips_higher():
    tokens = make_tokens([1.27, 1.29, 0.79], [1.0, 1.0, -1.0], [2, 1], aggregation="token-mean")
    _, clipped, gradient = learn("dapo", tokens)
    assert clipped == pytest.approx(2 / 3)  # 1.29 > 1.28 and 0.79 < 0.8
    assert gradient == pytest.approx([-1.27 / 3, 0, 0])


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_on_policy_all_losses_have_the_gradient_of_reinforce(name):
    tokens = make_tokens([1.0] * 4, [0.5, 0.5, -2.0, 1.0], [2, 1, 1], aggregation="token-mean")
    _, clipped, gradient = learn(name, tokens)
    assert clipped == 0
    assert gradient == pytest.approx([-0.5 / 4, -0.5 / 4, 2.0 / 4, -1.0 / 4])


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_rejected_tokens_and_the_micro_batches_change_nothing(name):
    lengths, generator = [2, 1, 3, 2], torch.Generator().manual_seed(5)
    ratios = (torch.rand(8, generator=generator, dtype=torch.float64) + 0.5).tolist()
    values = [1.0, 1.0, -2.0, 0.5, 0.5, 0.5, -1.0, -1.0]
    kept = [True, False, True, True, True, False, False, False]  # the last response is rejected whole
    whole = make_tokens(ratios, values, lengths, kept)
    loss, clipped, gradient = learn(name, whole, clip_low=0.1, clip_high=0.1)
    assert [value == 0 for value, keep in zip(gradient, kept, strict=True) if not keep] == [True] * 4
    assert any(gradient)

    spoilt = [ratio if keep else 1e6 for ratio, keep in zip(ratios, kept, strict=True)]
    assert learn(name, make_tokens(spoilt, values, lengths, kept), clip_low=0.1, clip_high=0.1) == (
        loss,
        clipped,
        gradient,
    )

    losses, gradients = [], []
    for cut, sequences in ((slice(0, 3), slice(0, 2)), (slice(3, 3), slice(2, 2)), (slice(3, 8), slice(2, 4))):
        names = ("entropy", "old_logprobs", "importance", "advantages", "weights")
        part = replace(whole, lengths=whole.lengths[sequences], **{name: getattr(whole, name)[cut] for name in names})
        part = replace(part, new_logprobs=whole.new_logprobs.detach()[cut].requires_grad_())
        part_loss, _, part_gradient = learn(name, part, clip_low=0.1, clip_high=0.1)
        losses.append(part_loss)
        gradients += part_gradient
    assert sum(losses) == pytest.approx(loss)
    assert gradients == pytest.approx(gradient)
