"""The critic of PPO: a Megatron model beside the policy that learns what a response will be worth."""

import torch
from jaxtyping import Float
from megatron.core.models.gpt import GPTModel

from megatron_rl.algorithms import token_weights
from megatron_rl.algorithms.ppo import explained_variance, value_loss
from megatron_rl.config import Config
from megatron_rl.distributed.runtime import Runtime
from megatron_rl.metrics import Metrics
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.value_head import attach_value_head
from megatron_rl.trainer.batch import Batch, Microbatch, with_values
from megatron_rl.trainer.pipeline_model import Progress
from megatron_rl.trainer.trained_model import TrainedModel, mean_metrics


class CriticHead:
    """Reads one value per response token, [tokens], from a value head in place of the output layer."""

    def attach(self, model: GPTModel) -> None:
        """Put the value head there."""
        attach_value_head(model)

    def read(self, microbatch: Microbatch, output: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See `OutputHead`."""
        return (output[:, 0],)


class Critic(TrainedModel):
    """A model that gives values: layout and passes of the policy, with a DDP and an optimizer of its own.

    It starts from the policy's weights, with a value head that gives 0.
    """

    def __init__(self, config: Config, runtime: Runtime, arch: Architecture) -> None:
        """Build this rank's part; the optimizer is as `train` has it, with the learning rate `algorithm.critic.lr`."""
        train = config.train.model_copy(update={"lr": config.algorithm.critic.lr})
        super().__init__(config.model_copy(update={"train": train}), runtime, arch, CriticHead())

    def values(self, batch: Batch, progress: Progress | None = None) -> Float[torch.Tensor, "tokens"]:
        """Expected return from each response token on, float32 [tokens] on every rank's CPU.

        A token's value is read where the policy chooses it, so it does not know the token yet.
        """
        return self._per_token(batch, progress)

    def update(self, batch: Batch, progress: Progress | None = None) -> Metrics:
        """Optimizer steps towards the returns, on the same mini-batches as the policy's.

        Args:
            batch: carries `values`, the critic's before the update, and `returns`.
            progress: called after every micro-batch.

        Returns:
            On rank 0 the metrics `critic/...` of docs/metrics.md, loss and metrics being means over tokens; elsewhere
            an empty dict.

        Raises:
            RuntimeError: on all ranks, after `train.max_skipped_updates` in a row that were not finite.
        """
        parts, clip = self.config.train.num_minibatches, self.config.algorithm.critic.clip
        size = len(batch.prompts) // parts

        def loss(microbatch: Microbatch, values: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            given = microbatch.values
            per_token, clipped = value_loss(values, given["values"], given["returns"], clip)
            total = (given["weights"] * per_token).sum()
            return total, {"loss": total.detach(), "clip_fraction": (given["weights"] * clipped).sum()}

        collected: list[Metrics] = []
        for part in range(parts):
            minibatch = batch.select(part * size, (part + 1) * size)
            minibatch = with_values(minibatch, weights=token_weights(minibatch.lengths, "token-mean"))
            collected.append(self._optimize(minibatch, loss, progress))
        if not self.runtime.is_driver:
            return {}
        means, names = mean_metrics(collected), ("loss", "clip_fraction", "grad_norm", "lr")
        values, returns = batch.values["values"], batch.values["returns"]
        return {f"critic/{name}": means[name] for name in names} | {
            "critic/explained_variance": explained_variance(values, returns),
            "critic/value_mean": values.mean().item() if len(values) else 0.0,
            "critic/return_mean": returns.mean().item() if len(returns) else 0.0,
        }
