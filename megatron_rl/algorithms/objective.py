"""The loss of a policy update (DESIGN section 7)."""

from jaxtyping import Float
from torch import Tensor

from megatron_rl.algorithms.base import PolicyLoss, PolicyTokens
from megatron_rl.algorithms.kl import kl_estimate
from megatron_rl.algorithms.loss import safe_exp


def policy_objective(tokens: PolicyTokens, algorithm: PolicyLoss) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """`sum_t weight_t (importance_t loss_t + kl_coef kl_t - entropy_coef entropy_t)`.

    The importance weight multiplies the algorithm's loss, before aggregation; it does not scale the KL and entropy
    terms. Rejected tokens have no part in any of them, nor in the metrics.

    Args:
        tokens: one micro-batch.
        algorithm: whose `token_loss` it is, and whose settings have the coefficients.

    Returns:
        The micro-batch's part of the loss, and its parts of the metrics (detached scalars). Everything is a sum: adding
        up over micro-batches and ranks gives the value for the whole mini-batch. `loss` and `policy_loss` are
        aggregated as the loss is; `kl` (to the reference), `entropy`, `clip_share` and `update_kl` (k3 estimate of how
        far the policy moved from `old_logprobs`) are means over tokens.

    Raises:
        ValueError: `algorithm.kl.coef` > 0, with the penalty in the loss, but no `ref_logprobs`.
    """
    tokens = tokens.without_rejected()
    new, old, settings = tokens.new_logprobs, tokens.old_logprobs, algorithm.settings
    per_token, clipped = algorithm.token_loss(tokens)
    sums = {"clip_share": clipped.float(), "entropy": tokens.entropy}
    per_token = per_token * tokens.importance
    total = per_token
    if settings.kl.coef > 0 and settings.kl.place == "loss":
        if tokens.ref_logprobs is None:
            raise ValueError("algorithm.kl.coef > 0 needs ref_logprobs")
        kl = kl_estimate(new, tokens.ref_logprobs, settings.kl.estimator)
        total = total + settings.kl.coef * kl
        sums["kl"] = kl
    if settings.entropy_coef > 0:
        total = total - settings.entropy_coef * tokens.entropy
    loss = (tokens.weights * total).sum()
    log_ratio = (new - old).detach()
    sums["update_kl"] = safe_exp(log_ratio) - 1 - log_ratio
    metrics = {name: values.detach().sum() / max(tokens.total_tokens, 1) for name, values in sums.items()}
    metrics["loss"] = loss.detach()
    metrics["policy_loss"] = (tokens.weights * per_token).detach().sum()
    return loss, metrics
