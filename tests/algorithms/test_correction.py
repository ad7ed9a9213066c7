import math

import pytest
import torch

from megatron_rl.algorithms import mismatch_metrics, tis_weights

OLD = torch.tensor([0.5, 0.2, 0.9, 0.1], dtype=torch.float64).log()
ROLLOUT = torch.tensor([0.25, 0.4, 0.3, 0.1], dtype=torch.float64).log()
# Ratios old / rollout: 2, 1/2, 3, 1.


def test_weights_are_ratios_cut_at_the_cap_without_gradient():
    weights = tis_weights(OLD.clone().requires_grad_(), ROLLOUT, cap=2.5)
    assert weights.tolist() == pytest.approx([2.0, 0.5, 2.5, 1.0])
    assert not weights.requires_grad


def test_metrics_by_hand():
    metrics = mismatch_metrics(OLD, ROLLOUT, cap=2.5)
    log2, log3 = math.log(2), math.log(3)
    assert metrics == pytest.approx(
        {
            "mean_abs": (log2 + log2 + log3 + 0) / 4,
            "max_abs": log3,
            "kl": ((2 - 1 - log2) + (0.5 - 1 + log2) + (3 - 1 - log3) + 0) / 4,
            "ess": 6.5**2 / (4 * (4 + 0.25 + 9 + 1)),
            "clipped_share": 0.25,
        }
    )


def test_equal_log_probs_have_no_mismatch():
    logprobs = torch.tensor([-1.0, -0.1])
    assert mismatch_metrics(logprobs, logprobs, cap=2.0) == {
        "mean_abs": 0.0,
        "max_abs": 0.0,
        "kl": 0.0,
        "ess": 1.0,
        "clipped_share": 0.0,
    }


def test_tiny_differences_do_not_drown_in_float32_rounding():
    rollout = torch.full((1000,), -1.0)
    delta = (rollout + 1e-5).double() - rollout.double()
    kl = mismatch_metrics(rollout + 1e-5, rollout)["kl"]
    assert kl == pytest.approx((delta**2 / 2).mean().item(), rel=1e-3)


def test_no_tokens_are_no_mismatch():
    assert mismatch_metrics(torch.empty(0), torch.empty(0), 2.0)["ess"] == 1.0
