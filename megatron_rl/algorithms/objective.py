"""The loss of a policy update (DESIGN section 7)."""

from dataclasses import dataclass, replace

from jaxtyping import Float
from torch import Tensor

from megatron_rl.algorithms.kl import kl_estimate
from megatron_rl.algorithms.loss import ppo_loss, safe_exp
from megatron_rl.config.schema import Algorithm


@dataclass(frozen=True)
class PolicyTokens:
    """The response tokens of one micro-batch, packed; only `new_logprobs` and `entropy` carry gradients."""

    new_logprobs: Float[Tensor, "tokens"]
    """Under the policy being trained."""
    entropy: Float[Tensor, "tokens"]
    """Of the policy being trained, in nats."""
    old_logprobs: Float[Tensor, "tokens"]
    """Under the trainer's weights before this step's updates."""
    importance: Float[Tensor, "tokens"]
    """The token's weight by `correct_mismatch` of the global mini-batch."""
    ref_logprobs: Float[Tensor, "tokens"] | None
    """Under the reference model; needed when `algorithm.kl.coef` > 0."""
    advantages: Float[Tensor, "tokens"]
    """The sequence's advantage, repeated for its tokens."""
    weights: Float[Tensor, "tokens"]
    """This micro-batch's part of `token_weights` of the global mini-batch; 0 for rejected tokens."""
    total_tokens: int
    """Response tokens of the global mini-batch that are not rejected (what the metrics are averaged over)."""

    def without_rejected(self) -> "PolicyTokens":
        """The same with 0 in place of every value of a rejected token, so that none of them reaches a sum."""
        rejected = self.weights == 0

        def zeroed(values: Float[Tensor, "tokens"]) -> Float[Tensor, "tokens"]:
            # Not a product with 0: that would let inf and nan through. Not an index: its size would stall a GPU.
            return values.masked_fill(rejected, 0)

        return replace(
            self,
            new_logprobs=zeroed(self.new_logprobs),
            entropy=zeroed(self.entropy),
            old_logprobs=zeroed(self.old_logprobs),
            importance=zeroed(self.importance),
            ref_logprobs=None if self.ref_logprobs is None else zeroed(self.ref_logprobs),
            advantages=zeroed(self.advantages),
        )


def policy_objective(tokens: PolicyTokens, algorithm: Algorithm) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """`sum_t weight_t (importance_t ppo_t + kl_coef kl_t - entropy_coef entropy_t)`.

    The importance weight multiplies the clipped loss, before aggregation; it does not scale the KL and entropy terms.
    Rejected tokens have no part in any of them, nor in the metrics.

    Args:
        tokens: one micro-batch.
        algorithm: the `algorithm` section.

    Returns:
        The micro-batch's part of the loss, and its parts of the metrics (detached scalars). Everything is a sum: adding
        up over micro-batches and ranks gives the value for the whole mini-batch. `loss` and `policy_loss` are
        aggregated as the loss is; `kl` (to the reference), `entropy`, `clip_share` and `update_kl` (k3 estimate of how
        far the policy moved from `old_logprobs`) are means over tokens.

    Raises:
        ValueError: `algorithm.kl.coef` > 0 without `ref_logprobs`.
    """
    tokens = tokens.without_rejected()
    new, old = tokens.new_logprobs, tokens.old_logprobs
    per_token, clipped = ppo_loss(
        new, old, tokens.advantages, algorithm.clip_low, algorithm.clip_high, algorithm.dual_clip
    )
    sums = {"clip_share": clipped.float(), "entropy": tokens.entropy}
    per_token = per_token * tokens.importance
    total = per_token
    if algorithm.kl.coef > 0:
        if tokens.ref_logprobs is None:
            raise ValueError("algorithm.kl.coef > 0 needs ref_logprobs")
        kl = kl_estimate(new, tokens.ref_logprobs, algorithm.kl.estimator)
        total = total + algorithm.kl.coef * kl
        sums["kl"] = kl
    if algorithm.entropy_coef > 0:
        total = total - algorithm.entropy_coef * tokens.entropy
    loss = (tokens.weights * total).sum()
    log_ratio = (new - old).detach()
    sums["update_kl"] = safe_exp(log_ratio) - 1 - log_ratio
    metrics = {name: values.detach().sum() / max(tokens.total_tokens, 1) for name, values in sums.items()}
    metrics["loss"] = loss.detach()
    metrics["policy_loss"] = (tokens.weights * per_token).detach().sum()
    return loss, metrics
