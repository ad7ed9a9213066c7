"""The difference between the engine that generated and the trainer that learns."""

from jaxtyping import Float
from torch import Tensor

from megatron_rl.algorithms.loss import safe_exp


def tis_weights(old: Float[Tensor, "tokens"], rollout: Float[Tensor, "tokens"], cap: float) -> Float[Tensor, "tokens"]:
    """Truncated importance weights `min(exp(old - rollout), cap)`, per token, without gradient.

    Source: Yao et al., "Your efficient RL framework secretly brings you off-policy RL training" (2025); the
    truncation is Ionides, "Truncated importance sampling" (2008).

    Args:
        old: the trainer's log-probs before the update.
        rollout: the engine's log-probs, of the distribution that was sampled.
        cap: largest weight.
    """
    return safe_exp(old - rollout).clamp(max=cap).detach()


def mismatch_metrics(
    old: Float[Tensor, "tokens"], rollout: Float[Tensor, "tokens"], cap: float | None = None
) -> dict[str, float]:
    """How far the trainer's log-probs are from the engine's, over all response tokens of a step.

    Args:
        old: the trainer's log-probs before the update.
        rollout: the engine's log-probs.
        cap: largest importance weight; None: no truncation, so `clipped_share` is 0.

    Returns:
        `mean_abs` and `max_abs` of `old - rollout` (nats); `kl`, the k3 estimate of KL(rollout || old) (Schulman,
        "Approximating KL divergence", 2020); `ess`, the effective sample size `(sum w)^2 / (n sum w^2)` of the
        untruncated weights, in (0, 1] (Kong, 1992); `clipped_share`, the share of weights above `cap`. No tokens
        give no difference: 0, 0, 0, 1, 0.
    """
    if old.numel() == 0:
        return {"mean_abs": 0.0, "max_abs": 0.0, "kl": 0.0, "ess": 1.0, "clipped_share": 0.0}
    # In float64: k3 subtracts nearly equal numbers, and the difference measured here may be 1e-5 or less.
    delta = (old.double() - rollout.double()).detach()
    weights = safe_exp(delta)
    return {
        "mean_abs": delta.abs().mean().item(),
        "max_abs": delta.abs().max().item(),
        "kl": (weights - 1 - delta).mean().item(),
        "ess": (weights.sum() ** 2 / (weights.numel() * (weights**2).sum())).item(),
        "clipped_share": 0.0 if cap is None else (weights > cap).double().mean().item(),
    }
