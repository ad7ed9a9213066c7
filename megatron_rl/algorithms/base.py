"""What an algorithm is: advantages from rewards, perhaps with a critic's values, and the loss of a token."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from megatron_rl.algorithms.loss import kl_estimate, ppo_loss, safe_exp
from megatron_rl.config.algorithm import AlgorithmConfig


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
    """By `PolicyAlgorithm.advantages` of the whole batch."""
    weights: Float[Tensor, "tokens"]
    """This micro-batch's part of `token_weights` of the global mini-batch; 0 for rejected tokens."""
    lengths: Int[Tensor, "sequences"]
    """Response tokens of every sequence of the micro-batch, which holds sequences whole; on the CPU."""
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

    def sequence_mean(self, values: Float[Tensor, "tokens"]) -> Float[Tensor, "tokens"]:
        """Each sequence's mean of `values` over its tokens that are not rejected, at every one of its tokens."""
        kept = (self.weights != 0).to(values.dtype)
        sequence = torch.arange(len(self.lengths)).repeat_interleave(self.lengths).to(values.device)
        zeros = torch.zeros(len(self.lengths), dtype=values.dtype, device=values.device)
        count = zeros.index_add(0, sequence, kept).clamp(min=1)
        return (zeros.index_add(0, sequence, values * kept) / count)[sequence]


class PolicyLoss:
    """What all algorithms have: the built-in ones and those that `algorithm.name` gives as `package.module:Class`.

    Derive them from `PolicyAlgorithm`, and define `advantages`, or from `CriticAlgorithm`, and define `estimate`.
    Override `token_loss` where the loss is not PPO's, and `__init__` to check options. KL penalty, entropy bonus,
    mismatch correction and aggregation are the same for all of them.

    An algorithm is built from its settings on every rank, several times in a run, and keeps nothing between calls, so a
    resumed run needs nothing else. Every rank calls it with the same values of the whole step (`advantages`,
    `estimate`), or with its own micro-batch (`token_loss`), and has to come to the same results: no random numbers.
    """

    def __init__(self, settings: AlgorithmConfig) -> None:
        """A class of one's own may check `settings.options` here, after `super().__init__(settings)`.

        Args:
            settings: the section `algorithm`.

        Raises:
            ConfigError: when a user's class rejects its `settings.options`.
        """
        self.settings = settings

    def token_loss(self, tokens: PolicyTokens) -> tuple[Float[Tensor, "tokens"], Bool[Tensor, "tokens"]]:
        """The policy loss of every token, before importance and aggregation weights; here that of PPO.

        Args:
            tokens: one micro-batch; all values of rejected tokens are 0.

        Returns:
            The loss, and a mask of the tokens whose ratio was clipped, for the metric `loss/clip_fraction`.
        """
        settings = self.settings
        return ppo_loss(
            tokens.new_logprobs,
            tokens.old_logprobs,
            tokens.advantages,
            settings.clip_low,
            settings.clip_high,
            settings.dual_clip,
        )


class PolicyAlgorithm(PolicyLoss, ABC):
    """An algorithm whose advantages follow from the rewards."""

    @abstractmethod
    def advantages(
        self, rewards: Float[Tensor, "batch"], groups: Int[Tensor, "batch"], lengths: Int[Tensor, "batch"]
    ) -> Float[Tensor, "tokens"]:
        """The advantage of every response token of a step.

        Args:
            rewards: one per response, penalties included.
            groups: the group (prompt) of every response; any integers, in any order.
            lengths: response lengths in tokens.

        Returns:
            Float values, response after response.
        """


class CriticAlgorithm(PolicyLoss, ABC):
    """An algorithm that needs a critic, which is trained beside the policy (`algorithm.critic`)."""

    @abstractmethod
    def estimate(
        self, rewards: Float[Tensor, "tokens"], values: Float[Tensor, "tokens"], lengths: Int[Tensor, "batch"]
    ) -> tuple[Float[Tensor, "tokens"], Float[Tensor, "tokens"]]:
        """The advantage of every response token of a step, and what the critic should have said.

        Args:
            rewards: of every token, response after response: the response's at its last token, penalties included.
            values: the critic's before the update, without knowledge of the token itself.
            lengths: response lengths in tokens; they sum up to `tokens`.

        Returns:
            Advantages, and the returns that the critic is trained towards; both without gradient.
        """


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
        aggregated as the loss is; `kl` (to the reference), `entropy`, `clip_fraction` and `update_kl` (k3 estimate of
        how far the policy moved from `old_logprobs`) are means over tokens.

    Raises:
        ValueError: `algorithm.kl.coef` > 0, with the penalty in the loss, but no `ref_logprobs`.
    """
    tokens = tokens.without_rejected()
    new, old, settings = tokens.new_logprobs, tokens.old_logprobs, algorithm.settings
    per_token, clipped = algorithm.token_loss(tokens)
    sums = {"clip_fraction": clipped.float(), "entropy": tokens.entropy}
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
