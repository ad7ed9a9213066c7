import math

import torch

from megatron_rl.algorithms import grpo_advantages


def test_advantages_are_relative_to_the_group_mean_and_sample_std():
    rewards = torch.tensor([1.0, 0.0, 0.0, 2.0, 4.0], dtype=torch.float64)
    groups = torch.tensor([7, 7, 7, 3, 3])
    # Group 7: mean 1/3, deviations 2/3, -1/3, -1/3, variance (4/9 + 1/9 + 1/9) / 2 = 1/3.
    # Group 3: mean 3, deviations -1, 1, variance (1 + 1) / 1 = 2.
    third = math.sqrt(1 / 3)
    expected = [2 / 3 / third, -1 / 3 / third, -1 / 3 / third, -1 / math.sqrt(2), 1 / math.sqrt(2)]
    result = grpo_advantages(rewards, groups, normalize_std=True, eps=0.0)
    torch.testing.assert_close(result, torch.tensor(expected, dtype=torch.float64))


def test_eps_is_added_to_the_std():
    result = grpo_advantages(torch.tensor([0.0, 2.0]), torch.tensor([0, 0]), True, eps=1.0)
    torch.testing.assert_close(result, torch.tensor([-1.0, 1.0]) / (math.sqrt(2) + 1))


def test_without_std_the_centred_rewards_remain():
    result = grpo_advantages(torch.tensor([1.0, 0.0, 5.0, 5.5]), torch.tensor([0, 0, 1, 1]), False)
    torch.testing.assert_close(result, torch.tensor([0.5, -0.5, -0.25, 0.25]))


def test_interleaved_groups_are_told_apart():
    result = grpo_advantages(torch.tensor([1.0, 10.0, 3.0, 20.0]), torch.tensor([0, 1, 0, 1]), False)
    torch.testing.assert_close(result, torch.tensor([-1.0, -5.0, 1.0, 5.0]))


def test_equal_rewards_give_exactly_zero_even_when_their_mean_rounds():
    rewards = torch.full((7,), 0.1)
    assert (rewards - rewards.sum() / 7).abs().max() > 0  # the naive formula would leave something to amplify
    for normalize in (True, False):
        assert torch.equal(grpo_advantages(rewards, torch.zeros(7, dtype=torch.long), normalize), torch.zeros(7))


def test_a_group_of_one_gives_zero():
    result = grpo_advantages(torch.tensor([3.0, 1.0, 2.0]), torch.tensor([5, 6, 6]), True)
    assert result[0] == 0.0
    assert torch.isfinite(result).all()
