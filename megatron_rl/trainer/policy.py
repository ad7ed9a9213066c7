"""The policy without training: the frozen reference, and what evaluation and warm-up read."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel

from megatron_rl.config import Config
from megatron_rl.distributed.runtime import Runtime
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.vocab_parallel_logprobs import token_logprobs
from megatron_rl.trainer.batch import Batch, Microbatch
from megatron_rl.trainer.pipeline_model import PipelineModel, Progress


@dataclass(frozen=True)
class PolicyHead:
    """Reads log-probabilities and entropies, [tokens] each, from the model's own output layer."""

    vocab_limit: int
    """Token ids from here on are excluded from every distribution."""
    temperature: float
    """Divides the logits of every distribution."""

    def attach(self, model: GPTModel) -> None:
        """A policy keeps the model's output layer."""

    def read(self, microbatch: Microbatch, output: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See `OutputHead`."""
        group = parallel_state.get_tensor_model_parallel_group()
        return token_logprobs(output, microbatch.targets, self.temperature, self.vocab_limit, group)


class Policy(PipelineModel):
    """A policy for forward passes alone."""

    def __init__(
        self, config: Config, runtime: Runtime, arch: Architecture, vocab_limit: int, temperature: float
    ) -> None:
        """Build this rank's part; see `PipelineModel` and `PolicyHead` for the arguments."""
        super().__init__(config, runtime, arch, PolicyHead(vocab_limit, temperature))

    def logprobs(self, batch: Batch, progress: Progress | None = None) -> Float[torch.Tensor, "tokens"]:
        """Log-probabilities of all response tokens, float32 [tokens] on every rank's CPU."""
        return self._per_token(batch, progress)
