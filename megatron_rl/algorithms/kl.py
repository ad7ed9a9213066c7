"""Per-token estimators of the KL divergence to the reference model."""

from typing import Literal

from jaxtyping import Float
from torch import Tensor

from megatron_rl.algorithms.loss import safe_exp


def kl_estimate(
    new: Float[Tensor, "tokens"], ref: Float[Tensor, "tokens"], estimator: Literal["k1", "k2", "k3"]
) -> Float[Tensor, "tokens"]:
    """Estimate of KL(new || ref) from tokens that `new` sampled, with `d = new - ref`.

    ========= ==================== ==========================
    estimator value                gradient
    ========= ==================== ==========================
    k1        d                    d * grad(new)
    k2        d^2 / 2              d * grad(new)
    k3        exp(-d) - 1 + d      (1 - exp(-d)) * grad(new)
    ========= ==================== ==========================

    Values: Schulman, "Approximating KL divergence" (2020): k1 and k3 are unbiased, k2 and k3 never negative.
    Gradients: Tang and Munos, "On a few pitfalls in KL divergence gradient estimation for RL", arXiv 2506.09477.
    Differentiating k1 itself gives `grad(new)`, whose expectation is 0: no penalty at all. k1 therefore keeps its
    value but takes the gradient of k2, which is an unbiased gradient of KL(new || ref). The gradient of k3, used
    by GRPO (arXiv 2402.03300, equation 4), is that of KL(ref || new); the two agree while d is small.

    Args:
        new: log-probs under the policy being trained; gradients flow through them.
        ref: log-probs under the reference, without gradients.
        estimator: k1, k2 or k3.

    Returns:
        One estimate per token.
    """
    difference = new - ref
    if estimator == "k3":
        return safe_exp(-difference) - 1 + difference
    k2 = difference**2 / 2
    return k2 if estimator == "k2" else difference.detach() + k2 - k2.detach()
