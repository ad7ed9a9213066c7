"""The critic of PPO: a Megatron model beside the policy that learns what a response will be worth."""

import torch
from jaxtyping import Float

from megatron_rl.algorithms import token_weights
from megatron_rl.algorithms.ppo import explained_variance, value_loss
from megatron_rl.config import Config
from megatron_rl.distributed.runtime import Runtime
from megatron_rl.metrics import Metrics
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.value_head import attach_value_head
from megatron_rl.trainer.batch import Batch, Microbatch, with_values
from megatron_rl.trainer.policy import Progress
from megatron_rl.trainer.trainer import Trainer


class Critic(Trainer):
    """A `Trainer` whose model gives values: same layout and passes, with a DDP and an optimizer of its own.

    It starts from the policy's weights, with a value head that gives 0.
    """

    def __init__(self, config: Config, runtime: Runtime, arch: Architecture) -> None:
        """Args: as of `Policy`. The optimizer is as `train` has it, with `algorithm.critic.lr` as learning rate."""
        train = config.train.model_copy(update={"lr": config.algorithm.critic.lr})
        super().__init__(config.model_copy(update={"train": train}), runtime, arch, arch.vocab_size, 1.0)

    def _attach_head(self) -> None:
        attach_value_head(self.model)

    def _read(self, microbatch: Microbatch, output: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (output[:, 0],)

    def values(self, batch: Batch, progress: Progress | None = None) -> Float[torch.Tensor, "tokens"]:
        """Expected return from each response token on, float32 [tokens] on every rank's CPU.

        A token's value is read where the policy chooses it, so it does not know the token yet.
        """
        return self._per_token(batch, progress)

    def update(self, batch: Batch, progress: Progress | None = None) -> Metrics:
        """Optimizer steps towards the returns, on the same mini-batches as the policy's.

        `batch` carries `values`, the critic's before the update, and `returns`. Loss and metrics are means over tokens.

        Returns:
            On rank 0 the metrics `critic/...` of docs/metrics.md, elsewhere an empty dict.
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
        names = ("loss", "clip_fraction", "grad_norm", "lr")
        metrics = {f"critic/{name}": sum(metrics[name] for metrics in collected) / parts for name in names}
        values, returns = batch.values["values"], batch.values["returns"]
        return metrics | {
            "critic/explained_variance": explained_variance(values, returns),
            "critic/value_mean": values.mean().item() if len(values) else 0.0,
            "critic/return_mean": returns.mean().item() if len(returns) else 0.0,
        }
