import math

import pytest
import torch

from megatron_rl.algorithms import kl_estimate


@pytest.mark.parametrize(
    ("estimator", "value", "gradient"),
    [
        # d = new - ref = ln 2: exp(-d) = 1/2.
        ("k1", math.log(2), math.log(2)),
        ("k2", math.log(2) ** 2 / 2, math.log(2)),
        ("k3", 0.5 - 1 + math.log(2), 1 - 0.5),
    ],
)
def test_value_and_gradient_by_hand(estimator, value, gradient):
    new = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([-1.0 - math.log(2)], dtype=torch.float64)
    estimate = kl_estimate(new, ref, estimator)
    estimate.sum().backward()
    assert estimate.item() == pytest.approx(value)
    assert new.grad.item() == pytest.approx(gradient)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_equal_policies_have_no_divergence_and_no_gradient(estimator):
    new = torch.tensor([-0.5, -3.0], requires_grad=True)
    estimate = kl_estimate(new, new.detach().clone(), estimator)
    estimate.sum().backward()
    assert torch.equal(estimate.detach(), torch.zeros(2))
    assert torch.equal(new.grad, torch.zeros(2))


def _expectation(estimator, logits, ref):
    """Exact expectation over the policy of the estimate and of its gradient: the sampling is not differentiated."""
    new = logits.log_softmax(-1)
    return (new.exp().detach() * kl_estimate(new, ref, estimator)).sum()


def test_expected_values_and_gradients_are_those_of_the_kl_divergence():
    logits = torch.tensor([0.3, -0.2, 1.0], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([0.1, 0.4, 0.2], dtype=torch.float64).log_softmax(-1)
    new = logits.log_softmax(-1)
    reverse = (new.exp() * (new - ref)).sum()
    forward = (ref.exp() * (ref - new)).sum()
    (reverse_gradient,) = torch.autograd.grad(reverse, logits, retain_graph=True)
    (forward_gradient,) = torch.autograd.grad(forward, logits)
    for estimator, expected in (("k1", reverse_gradient), ("k2", reverse_gradient), ("k3", forward_gradient)):
        value = _expectation(estimator, logits, ref)
        (gradient,) = torch.autograd.grad(value, logits)
        torch.testing.assert_close(gradient, expected)
        if estimator != "k2":
            assert value.item() == pytest.approx(reverse.item())


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("difference", [-1000.0, -25.0, -20.0, 20.0, 25.0, 1000.0])
def test_far_policies_are_pulled_towards_each_other_and_the_gradient_is_finite(estimator, difference):
    new = torch.tensor([difference - 1001], requires_grad=True)
    kl_estimate(new, torch.tensor([-1001.0]), estimator).sum().backward()
    assert torch.isfinite(new.grad).all()
    assert new.grad.sign().item() == math.copysign(1, difference)


def test_the_pull_of_k3_does_not_jump_where_its_exponential_is_bounded():
    new = torch.tensor([-20.001, -19.999, -30.0], dtype=torch.float64, requires_grad=True)
    values = kl_estimate(new, torch.zeros(3, dtype=torch.float64), "k3")
    values.sum().backward()
    outside, inside, far = new.grad.tolist()
    assert outside == far == pytest.approx(1 - math.exp(20))
    assert inside == pytest.approx(outside, rel=2e-3)
    assert values[0].item() == pytest.approx(values[1].item(), rel=3e-3)
