"""The policy's updates."""

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float

from megatron_rl.algorithms import (
    PolicyLoss,
    PolicyTokens,
    TokenCorrection,
    correct_mismatch,
    policy_objective,
    token_weights,
)
from megatron_rl.config import Config
from megatron_rl.config.algorithm import AlgorithmConfig
from megatron_rl.distributed.runtime import Runtime
from megatron_rl.metrics import Metrics
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.weights import PolicyWeights, export_hf
from megatron_rl.trainer.batch import Batch, Microbatch, with_values
from megatron_rl.trainer.pipeline_model import PositionedValues, Progress
from megatron_rl.trainer.policy import PolicyHead
from megatron_rl.trainer.trained_model import TrainedModel, mean_metrics


@dataclass(frozen=True)
class UpdateResult:
    """What one update of the policy did."""

    metrics: Metrics
    """On rank 0, means over the mini-batches of what `policy_objective` reports, of the gradient norm and learning
    rate, of `skipped`: 1 for a mini-batch whose tokens were all rejected, and of `not_finite`: 1 for one whose loss or
    gradient is not finite. Both leave the policy as it is. Elsewhere an empty dict."""
    correction: TokenCorrection
    """Of the tokens of the batch, on every rank."""
    old_logprobs: Float[torch.Tensor, "tokens"]
    """Of the batch before the update, float32 on every rank's CPU: those given, or those that the update found."""


class Trainer(TrainedModel):
    """The trained policy."""

    def __init__(
        self,
        config: Config,
        runtime: Runtime,
        arch: Architecture,
        vocab_limit: int,
        temperature: float,
        steps: int | None = None,
    ) -> None:
        """Build this rank's part and its optimizer; see `TrainedModel` and `PolicyHead` for the arguments."""
        super().__init__(config, runtime, arch, PolicyHead(vocab_limit, temperature), steps)
        self.vocab_limit = vocab_limit
        self.weights = PolicyWeights(self.model, arch)

    def logprobs(self, batch: Batch, progress: Progress | None = None) -> Float[torch.Tensor, "tokens"]:
        """Log-probabilities of all response tokens, float32 [tokens] on every rank's CPU."""
        return self._per_token(batch, progress)

    def export_hf(self, folder: Path) -> None:
        """Write the policy as a Hugging Face model; on every rank."""
        export_hf(self.weights, self.config.model.path, folder)

    def update(self, batch: Batch, algorithm: PolicyLoss, progress: Progress | None = None) -> UpdateResult:
        """One RL update: `train.num_minibatches` optimizer steps on consecutive parts of the batch.

        Args:
            batch: carries rollout_logprobs, advantages, with a KL penalty ref_logprobs, and old_logprobs. Without the
                last, the log-probs of the update's own forward pass are taken for them (see `Config.scores_in_update`).
            algorithm: whose loss it is; its settings also name the correction and the aggregation.
            progress: called after every micro-batch.

        Raises:
            ValueError: there are no old_logprobs, but several mini-batches or a correction that compares responses.
            RuntimeError: on all ranks, after `train.max_skipped_updates` in a row that were not finite.
        """
        parts, known = self.config.train.num_minibatches, "old_logprobs" in batch.values
        if not known and (parts > 1 or algorithm.settings.correction.compares_responses):
            raise ValueError("mini-batches and corrections that compare responses need old_logprobs before the update")
        size = len(batch.prompts) // parts
        update = self._update if known else self._score_and_update
        done = [update(batch.select(part * size, (part + 1) * size), algorithm, progress) for part in range(parts)]
        return UpdateResult(
            mean_metrics([each.metrics for each in done]),
            TokenCorrection.of_all([each.correction for each in done]),
            torch.cat([each.old_logprobs for each in done]),
        )

    def _update(self, minibatch: Batch, algorithm: PolicyLoss, progress: Progress | None) -> UpdateResult:
        """One optimizer step on a mini-batch with old log-probs."""
        settings, lengths = algorithm.settings, minibatch.lengths
        # Constants of the whole mini-batch, the same on every rank: how it is split cannot change them.
        correction = _correct(minibatch.values, lengths, settings)
        total = int(correction.kept.sum())
        longest, denominator = self.config.rollout.max_tokens, settings.correction.denominator
        weights = token_weights(lengths, settings.aggregation, correction.kept, longest, denominator)

        def loss(
            microbatch: Microbatch, logprobs: torch.Tensor, entropies: torch.Tensor
        ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            own_lengths = lengths[microbatch.sequences]
            return policy_objective(_tokens(microbatch.values, logprobs, entropies, own_lengths, total), algorithm)

        batch = with_values(minibatch, importance=correction.weights, weights=weights)
        return UpdateResult(self._optimize(batch, loss, progress), correction, minibatch.values["old_logprobs"])

    def _score_and_update(self, minibatch: Batch, algorithm: PolicyLoss, progress: Progress | None) -> UpdateResult:
        """One optimizer step whose own forward pass gives the old log-probs."""
        settings, lengths = algorithm.settings, minibatch.lengths
        weights = token_weights(lengths, settings.aggregation, None, self.config.rollout.max_tokens)
        found: list[PositionedValues] = []

        def loss(
            microbatch: Microbatch, logprobs: torch.Tensor, entropies: torch.Tensor
        ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            own_lengths = lengths[microbatch.sequences]
            values = microbatch.values | {"old_logprobs": logprobs.detach()}
            values["importance"] = _correct(values, own_lengths, settings).weights
            found.append((microbatch.flat_index, values["old_logprobs"]))
            return policy_objective(_tokens(values, logprobs, entropies, own_lengths, minibatch.tokens), algorithm)

        metrics = self._optimize(with_values(minibatch, weights=weights), loss, progress)
        old_logprobs = self._gather(minibatch, found)
        correction = _correct(minibatch.values | {"old_logprobs": old_logprobs}, lengths, settings)
        return UpdateResult(metrics, correction, old_logprobs)

    def imitate(self, batch: Batch, progress: Progress | None = None) -> Metrics:
        """One supervised step towards the mean negative log-likelihood of the response tokens.

        Returns:
            On rank 0 the metrics, those of `UpdateResult` that have a meaning here; elsewhere an empty dict.

        Raises:
            RuntimeError: as `update`.
        """
        batch = with_values(batch, weights=token_weights(batch.lengths, "token-mean"))

        def loss(
            microbatch: Microbatch, logprobs: torch.Tensor, entropies: torch.Tensor
        ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            value = -(microbatch.values["weights"] * logprobs).sum()
            return value, {"loss": value.detach()}

        return self._optimize(batch, loss, progress)


def _tokens(
    values: dict[str, torch.Tensor],
    logprobs: Float[torch.Tensor, "tokens"],
    entropies: Float[torch.Tensor, "tokens"],
    lengths: torch.Tensor,
    total: int,
) -> PolicyTokens:
    return PolicyTokens(
        new_logprobs=logprobs,
        entropy=entropies,
        old_logprobs=values["old_logprobs"],
        importance=values["importance"],
        ref_logprobs=values.get("ref_logprobs"),
        advantages=values["advantages"],
        weights=values["weights"],
        lengths=lengths,
        total_tokens=total,
    )


def _correct(values: dict[str, torch.Tensor], lengths: torch.Tensor, settings: AlgorithmConfig) -> TokenCorrection:
    old, rollout, reused = values["old_logprobs"], values["rollout_logprobs"], values.get("reused")
    return correct_mismatch(old, rollout, lengths, settings.correction, reused)
