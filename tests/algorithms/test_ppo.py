import pytest
import torch

from megatron_rl.algorithms import load_algorithm
from megatron_rl.algorithms.ppo import explained_variance, final_rewards, gae, value_loss
from megatron_rl.config.algorithm import AlgorithmConfig


def _tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_the_reward_is_given_at_the_last_token():
    assert final_rewards(_tensor(1.0, 7.0, -2.0), torch.tensor([3, 0, 1])).tolist() == [0, 0, 1, -2]


def test_advantages_and_returns_by_hand():
    # gamma 0.9, lambda 0.5. First response, rewards 0 0 1, values 0.5 0.4 0.2:
    #   d_2 = 1 - 0.2 = 0.8                     A_2 = 0.8
    #   d_1 = 0.9 * 0.2 - 0.4 = -0.22           A_1 = -0.22 + 0.45 * 0.8 = 0.14
    #   d_0 = 0.9 * 0.4 - 0.5 = -0.14           A_0 = -0.14 + 0.45 * 0.14 = -0.077
    # The empty response has no token. The single token: A = -2 - 0.3 = -2.3.
    rewards, values = _tensor(0, 0, 1, -2), _tensor(0.5, 0.4, 0.2, 0.3)
    advantages, returns = gae(rewards, values, torch.tensor([3, 0, 1]), 0.9, 0.5)
    assert advantages.tolist() == pytest.approx([-0.077, 0.14, 0.8, -2.3])
    assert returns.tolist() == pytest.approx([0.423, 0.54, 1.0, -2.0])


def test_lambda_1_gives_returns_and_lambda_0_one_step_differences():
    rewards, values, lengths = _tensor(1, 2, 4), _tensor(10, 20, 30), torch.tensor([3])
    advantages, returns = gae(rewards, values, lengths, 0.5, 1.0)
    assert returns.tolist() == pytest.approx([1 + 0.5 * (2 + 0.5 * 4), 2 + 0.5 * 4, 4])
    assert advantages.tolist() == pytest.approx([3 - 10, 4 - 20, 4 - 30])
    advantages, _ = gae(rewards, values, lengths, 0.5, 0.0)
    assert advantages.tolist() == pytest.approx([1 + 0.5 * 20 - 10, 2 + 0.5 * 30 - 20, 4 - 30])


def test_nothing_flows_between_responses_or_to_the_critic():
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([4, 1, 7])
    rewards, values = (torch.randn(12, generator=generator, dtype=torch.float64) for _ in range(2))
    advantages, returns = gae(rewards, values.requires_grad_(), lengths, 0.99, 0.95)
    assert not advantages.requires_grad and not returns.requires_grad
    alone = [
        gae(r, v, torch.tensor([len(r)]), 0.99, 0.95)[0]
        for r, v in zip(rewards.split([4, 1, 7]), values.split([4, 1, 7]), strict=True)
    ]
    torch.testing.assert_close(advantages, torch.cat(alone))


def test_no_tokens_have_no_advantages():
    empty = torch.zeros(0)
    for lengths in (torch.tensor([0, 0]), torch.zeros(0, dtype=torch.long)):
        assert all(result.shape == (0,) for result in gae(empty, empty, lengths, 1.0, 1.0))


def test_the_critic_may_not_move_further_than_the_clip():
    # Old value 0, clip 0.2, return 1. At 0.1 the loss is (0.1 - 1)^2 / 2 = 0.405, gradient -0.9; at 0.5 it stays at
    # (0.2 - 1)^2 / 2 = 0.32 without one. Away from the return, at -0.5, the plain loss 1.5^2 / 2 is the larger.
    values = _tensor(0.1, 0.5, -0.5).requires_grad_()
    loss, clipped = value_loss(values, _tensor(0, 0, 0), _tensor(1, 1, 1), 0.2)
    assert loss.tolist() == pytest.approx([0.405, 0.32, 1.125])
    assert clipped.tolist() == [False, True, False]
    (gradient,) = torch.autograd.grad(loss.sum(), values)
    assert gradient.tolist() == pytest.approx([-0.9, 0, -1.5])


def test_rounding_is_not_taken_for_clipping():
    # Small numbers of both signs, whose differences do not fit into float32.
    old, values = (torch.randn(1000, generator=torch.Generator().manual_seed(seed)) / 100 for seed in (1, 2))
    assert (old + (values - old) != values).any()
    assert not value_loss(values, old, torch.zeros(1000), 0.2)[1].any()
    assert not value_loss(values, old, torch.ones(1000), 0.2)[1].any()


def test_without_a_clip_it_is_half_the_squared_error():
    loss, clipped = value_loss(_tensor(3.0), _tensor(0.0), _tensor(1.0), None)
    assert (loss.tolist(), clipped.tolist()) == ([2.0], [False])


def test_ppo_whitens_the_advantages_and_not_the_returns():
    # Advantages of one-token responses are reward - value: 1, -1, 3. Mean 1, variance (0 + 4 + 4) / 3.
    rewards, values, lengths = _tensor(1, 0, 4), _tensor(0, 1, 1), torch.tensor([1, 1, 1])
    advantages, returns = load_algorithm(AlgorithmConfig(name="ppo")).estimate(rewards, values, lengths)
    s = (8 / 3) ** 0.5
    assert advantages.tolist() == pytest.approx([0, -2 / s, 2 / s])
    assert returns.tolist() == [1, 0, 4]
    plain = load_algorithm(AlgorithmConfig(name="ppo", normalize_std=False))
    assert plain.estimate(rewards, values, lengths)[0].tolist() == [1, -1, 3]


def test_explained_variance_by_hand():
    # Returns 0, 1, 2: variance 2/3. Errors of 0, 0, 1: mean 1/3, variance 2/9. A constant offset explains all the same.
    returns = _tensor(0, 1, 2)
    assert explained_variance(_tensor(0, 1, 1), returns) == pytest.approx(1 - 1 / 3)
    assert explained_variance(returns + 5, returns) == pytest.approx(1)
    assert explained_variance(_tensor(3, 3, 3), returns) == pytest.approx(0)
    assert explained_variance(_tensor(0, 1), _tensor(2, 2)) == 0
    assert explained_variance(torch.zeros(0), torch.zeros(0)) == 0
