import math

import pytest
import torch

from megatron_rl.algorithms import PolicyTokens, ppo_loss
from megatron_rl.algorithms.gspo import Gspo
from megatron_rl.config.algorithm import AlgorithmConfig


def _loss(ratios, advantages, low=0.2, high=0.3, dual=None):
    new = torch.tensor(ratios, dtype=torch.float64).log().requires_grad_()
    loss, clipped = ppo_loss(new, torch.zeros_like(new), torch.tensor(advantages, dtype=torch.float64), low, high, dual)
    (gradient,) = torch.autograd.grad(loss.sum(), new)
    return loss.tolist(), clipped.tolist(), gradient.tolist()


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped", "gradient"),
    [
        # Inside the range: -r A, and d(-r A)/d(new) = -r A.
        (1.0, 2.0, -2.0, False, -2.0),
        (1.25, 2.0, -2.5, False, -2.5),
        (0.9, -1.0, 0.9, False, 0.9),
        # r > 1 + high with A > 0: -(1.3) A, no gradient. r < 1 - low with A < 0: -(0.8) A, no gradient.
        (1.5, 2.0, -2.6, True, 0.0),
        (0.5, -1.0, 0.8, True, 0.0),
        # Outside the range on the side that the minimum does not clip.
        (0.5, 2.0, -1.0, False, -1.0),
        (1.5, -1.0, 1.5, False, 1.5),
        # No advantage, no loss.
        (3.0, 0.0, 0.0, False, 0.0),
    ],
)
def test_token_loss_mask_and_gradient(ratio, advantage, loss, clipped, gradient):
    losses, mask, gradients = _loss([ratio], [advantage])
    assert losses == pytest.approx([loss])
    assert mask == [clipped]
    assert gradients == pytest.approx([gradient])


def test_clip_higher_widens_only_the_upper_side():
    narrow = _loss([1.25, 0.75], [1.0, -1.0], low=0.2, high=0.2)
    wide = _loss([1.25, 0.75], [1.0, -1.0], low=0.2, high=0.28)
    assert narrow[1] == [True, True]
    assert wide[1] == [False, True]


def test_dual_clip_bounds_the_loss_of_negative_advantages_only():
    losses, mask, gradients = _loss([5.0, 5.0, 2.0], [-2.0, 2.0, -2.0], dual=3.0)
    # A = -2: -r A = 10 is bounded by 3 * 2 = 6; A = 2 is clipped by PPO at -1.3 * 2; r = 2 < 3 stays at 4.
    assert losses == pytest.approx([6.0, -2.6, 4.0])
    assert mask == [True, True, False]
    assert gradients == pytest.approx([0.0, 0.0, 4.0])


def test_a_huge_log_ratio_stays_finite():
    new = torch.tensor([500.0, -500.0], requires_grad=True)
    loss, _ = ppo_loss(new, torch.zeros(2), torch.tensor([-1.0, 1.0]), 0.2, 0.2)
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(new.grad).all()


@pytest.mark.parametrize("loss_of", ["token", "response"])
def test_a_token_that_became_far_too_likely_keeps_its_gradient(loss_of):
    new = torch.tensor([19.99, 20.01, 50.0], dtype=torch.float64, requires_grad=True)
    old, advantages = torch.zeros(3, dtype=torch.float64), torch.full((3,), -1.0, dtype=torch.float64)
    if loss_of == "token":
        loss, clipped = ppo_loss(new, old, advantages, 0.2, 0.2)
    else:
        kept = torch.ones(3, dtype=torch.float64)
        tokens = PolicyTokens(new, old, old, kept, None, advantages, kept, torch.tensor([1, 1, 1]), 3)
        loss, clipped = Gspo(AlgorithmConfig(name="gspo")).token_loss(tokens)
    loss.sum().backward()
    assert not clipped.any()
    assert new.grad[0].item() == pytest.approx(math.exp(19.99))
    assert new.grad[1:].tolist() == pytest.approx([math.exp(20)] * 2), "bounded, and it does not vanish"


def test_on_policy_gradient_is_the_policy_gradient():
    new = torch.log(torch.tensor([0.3, 0.6])).requires_grad_()
    loss, clipped = ppo_loss(new, new.detach(), torch.tensor([1.5, -0.5]), 0.2, 0.2)
    (gradient,) = torch.autograd.grad(loss.sum(), new)
    assert gradient.tolist() == pytest.approx([-1.5, 0.5])
    assert not clipped.any()
    assert loss.tolist() == pytest.approx([-1.5, 0.5])
    assert math.isclose(loss.sum().item(), -1.0, rel_tol=1e-6)
