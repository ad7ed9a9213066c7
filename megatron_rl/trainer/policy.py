"""The policy's forward passes over megatron-core's pipeline schedules."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func

from drafter.idle_time.pipeline_bubbles import BubbleCommunicator
from drafter.idle_time.wait_filler import ThreadFill
from megatron_rl.config import Config
from megatron_rl.distributed.runtime import Runtime
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.context_parallel import join
from megatron_rl.models.gpt import build_policy
from megatron_rl.models.megatron_folder import has_megatron_weights, load_megatron_weights
from megatron_rl.models.vocab_parallel_logprobs import token_logprobs
from megatron_rl.models.weights import draw_weights, has_hf_weights, load_hf_weights
from megatron_rl.observability.console import Console
from megatron_rl.trainer.batch import Batch, Microbatch, build_microbatch, plan_microbatches

Progress = Callable[[int, int], None]
"""Called with (micro-batches done, micro-batches in all) of this rank."""


LossFunction = Callable[..., tuple[torch.Tensor, dict[str, torch.Tensor]]]
"""(micro-batch, logprobs [tokens], entropies [tokens]) -> (this micro-batch's part of the loss, of the metrics).

A critic has values [tokens] in place of the two."""


PlacedValues = tuple[torch.Tensor, torch.Tensor]
"""(places in the flat layout, int64 [tokens] on the CPU; their values, float32 [tokens] on the device)."""


def _is_first_copy() -> bool:
    """Whether this rank's log-probs count: those of its tensor- and context-parallel peers are the same."""
    peers = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_context_parallel_rank()
    return peers == (0, 0)


class Policy:
    """A model for forward passes: the frozen reference, or the base of the trained policy."""

    def __init__(
        self, config: Config, runtime: Runtime, arch: Architecture, vocab_limit: int, temperature: float
    ) -> None:
        """Build this rank's part and load its weights from `config.model.path`, or draw them for `model.scratch`.

        Args:
            config: the experiment.
            runtime: this process's place.
            arch: shape of the model.
            vocab_limit: token ids from here on are excluded from every distribution.
            temperature: divides the logits of every distribution.
        """
        self.config, self.runtime, self.arch = config, runtime, arch
        self.vocab_limit, self.temperature = vocab_limit, temperature
        self.model: GPTModel = build_policy(config, arch)
        if has_megatron_weights(config.model.path):
            load_megatron_weights(self.model, config.model.path)
        elif config.model.scratch is not None and not has_hf_weights(config.model.path):
            draw_weights(self.model, arch, config.train.seed)
        else:
            with Console(runtime.is_driver).progress("reading weights") as read:
                load_hf_weights(self.model, arch, config.model.path, read)
        self._attach_head()
        self.module: torch.nn.Module = self.model
        self.bubbles: BubbleCommunicator | None = None
        self.on_microbatch: Callable[[Microbatch], None] | None = None
        """Called with each micro-batch before its forward pass."""

    def fill_bubbles(self, fill: ThreadFill) -> BubbleCommunicator:
        """From now on, run slices while this pipeline stage waits for others. Does not change what is computed."""
        config = self.model.config
        self.bubbles = BubbleCommunicator(parallel_state.get_pipeline_model_parallel_group(), config, fill)
        if config.finalize_model_grads_func is not None:
            config.finalize_model_grads_func = self.bubbles.flushing(config.finalize_model_grads_func)
        return self.bubbles

    def logprobs(self, batch: Batch, progress: Progress | None = None) -> Float[torch.Tensor, "tokens"]:
        """Log-probabilities of all response tokens, float32 [tokens] on every rank's CPU."""
        return self._per_token(batch, progress)

    def _attach_head(self) -> None:
        """Called once the weights are loaded. A policy keeps the model's output layer."""

    @torch.no_grad()
    def _per_token(self, batch: Batch, progress: Progress | None) -> Float[torch.Tensor, "tokens"]:
        """The first of what `_read` gives for all response tokens, float32 [tokens] on every rank's CPU."""
        self.module.eval()
        return self._gather(batch, self._run(batch, None, forward_only=True, progress=progress))

    def _gather(self, batch: Batch, found: list[PlacedValues]) -> Float[torch.Tensor, "tokens"]:
        """What the ranks found for their micro-batches, for all response tokens on every rank."""
        flat = torch.zeros(batch.tokens)
        if _is_first_copy():
            for places, values in found:
                flat[places] = values.cpu()
        # Each token was scored by one data-parallel rank; all others hold zeros.
        torch.distributed.all_reduce(flat, group=self.runtime.control_group)
        return flat

    def _run(
        self, batch: Batch, loss_function: LossFunction | None, forward_only: bool, progress: Progress | None
    ) -> list[Any]:
        """One pass of this rank's share through the pipeline schedule.

        Returns, on the last stage: per micro-batch (flat places, their values) without a loss, else the metrics.
        """
        lengths = [batch.sequence_length(index) for index in range(len(batch.prompts))]
        budget = self.config.train.tokens_per_microbatch
        replicas = parallel_state.get_data_parallel_world_size()
        shares = plan_microbatches(lengths, budget, replicas, equally_many=self.config.parallel.ep_size > 1)
        rows = shares[parallel_state.get_data_parallel_rank()]
        multiple = self.config.parallel.tp_size if self.config.parallel.sequence_parallel else 1
        part = parallel_state.get_context_parallel_rank(), self.config.parallel.cp_size

        def microbatches() -> Iterator[Microbatch]:
            for done, row in enumerate(rows):
                yield build_microbatch(batch, row, multiple, self.runtime.device, part)
                if progress is not None:
                    progress(done + 1, len(rows))

        pipeline = self.bubbles.start_pass(len(rows), forward_only) if self.bubbles is not None else {}
        results: list[Any] = get_forward_backward_func()(
            forward_step_func=partial(self._forward_step, loss_function),
            data_iterator=microbatches(),
            model=[self.module],
            num_microbatches=len(rows),
            seq_length=budget,
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=loss_function is None,
            **pipeline,
        )
        return results

    def _forward_step(
        self, loss_function: LossFunction | None, iterator: Iterator[Microbatch], module: torch.nn.Module
    ) -> tuple[torch.Tensor, Callable[..., Any]]:
        microbatch = next(iterator)
        self.model.selected_rows = microbatch.rows
        if self.on_microbatch is not None:
            self.on_microbatch(microbatch)
        output = module(microbatch.input_ids, None, None, packed_seq_params=microbatch.packing)
        return output, partial(self._finish, microbatch, loss_function)

    def _finish(
        self,
        microbatch: Microbatch,
        loss_function: LossFunction | None,
        output: torch.Tensor,
        non_loss_data: bool = False,
    ) -> Any:
        output = output[0]
        if self.config.parallel.sequence_parallel:
            output = output.index_select(0, microbatch.rows)
        values = self._read(microbatch, output)
        if microbatch.own is not None:
            total, group = len(microbatch.flat_index), parallel_state.get_context_parallel_group()
            values = tuple(join(part, microbatch.own, total, group, sum_gradients=False) for part in values)
        if loss_function is None:
            return microbatch.flat_index, values[0]
        loss, metrics = loss_function(microbatch, *values)
        # With zero counted tokens megatron-core leaves the gradient as it is: the weights are already normalised.
        return loss, torch.zeros((), dtype=torch.int64, device=loss.device), metrics

    def _read(self, microbatch: Microbatch, output: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What the output layer's rows [tokens, ...] say about the response tokens: logprobs and entropies [tokens]."""
        return token_logprobs(
            output,
            microbatch.targets,
            self.temperature,
            self.vocab_limit,
            parallel_state.get_tensor_model_parallel_group(),
        )
