"""A model over megatron-core's parallel groups, and its passes through the pipeline schedules.

Every rank calls every method with the same batch; data-parallel ranks take their shares of it, pipeline stages and
tensor-parallel parts take their positions by megatron-core's groups.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Protocol

import torch
from jaxtyping import Float
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func

from drafter.idle_time.pipeline_bubbles import BubbleCommunicator
from megatron_rl.config import Config
from megatron_rl.distributed.runtime import Runtime
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.context_parallel import join
from megatron_rl.models.gpt import build_policy
from megatron_rl.models.megatron_folder import load_megatron_weights
from megatron_rl.models.stored_tensors import has_hf_weights, has_megatron_weights
from megatron_rl.models.weights import draw_weights, load_hf_weights
from megatron_rl.observability.console import Console
from megatron_rl.trainer.batch import Batch, Microbatch, build_microbatch, plan_microbatches

Progress = Callable[[int, int], None]
"""Called with (micro-batches done, micro-batches in all) of this rank."""


LossFunction = Callable[..., tuple[torch.Tensor, dict[str, torch.Tensor]]]
"""(micro-batch, values [tokens] by the output head) -> (this micro-batch's part of the loss, of the metrics)."""


PositionedValues = tuple[torch.Tensor, torch.Tensor]
"""(positions in the flat layout, int64 [tokens] on the CPU; their values, float32 [tokens] on the device)."""


class OutputHead(Protocol):
    """What a model says about each response token."""

    def attach(self, model: GPTModel) -> None:
        """Change the output layer of this rank's part, once its weights are loaded."""
        ...

    def read(self, microbatch: Microbatch, output: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What the output layer's rows [tokens, ...] say about the response tokens: values of shape [tokens]."""
        ...


def is_first_copy() -> bool:
    """Whether this rank's values count: those of its tensor- and context-parallel peers are the same."""
    peers = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_context_parallel_rank()
    return peers == (0, 0)


class PipelineModel:
    """This rank's part of a model, with forward passes. The base of the policy, the reference and the critic."""

    def __init__(self, config: Config, runtime: Runtime, arch: Architecture, head: OutputHead) -> None:
        """Build this rank's part and load its weights from `config.model.path`, or draw them for `model.scratch`.

        Args:
            config: the experiment.
            runtime: this process's place.
            arch: shape of the model.
            head: what is read from the model's output.
        """
        self.config, self.runtime, self.arch = config, runtime, arch
        self.model: GPTModel = build_policy(config, arch)
        if has_megatron_weights(config.model.path):
            load_megatron_weights(self.model, config.model.path)
        elif config.model.scratch is not None and not has_hf_weights(config.model.path):
            draw_weights(self.model, arch, config.train.seed)
        else:
            with Console(runtime.is_driver).progress("reading weights") as read:
                load_hf_weights(self.model, arch, config.model.path, read)
        self._head = head
        head.attach(self.model)
        self.module: torch.nn.Module = self.model
        """What the passes go through: the model, or what wraps it."""
        self._bubbles: BubbleCommunicator | None = None
        self._observers: list[Callable[[Microbatch], None]] = []

    @contextlib.contextmanager
    def observing_microbatches(self, observe: Callable[[Microbatch], None]) -> Iterator[None]:
        """Within the block, `observe` is called with each micro-batch before its forward pass."""
        self._observers.append(observe)
        try:
            yield
        finally:
            self._observers.remove(observe)

    @torch.no_grad()
    def _per_token(self, batch: Batch, progress: Progress | None) -> Float[torch.Tensor, "tokens"]:
        """The first of what the head reads for all response tokens, float32 [tokens] on every rank's CPU."""
        self.module.eval()
        return self._gather(batch, self._run(batch, None, forward_only=True, progress=progress))

    def _gather(self, batch: Batch, found: list[PositionedValues]) -> Float[torch.Tensor, "tokens"]:
        """What the ranks found for their micro-batches, for all response tokens on every rank."""
        flat = torch.zeros(batch.tokens)
        if is_first_copy():
            for positions, values in found:
                flat[positions] = values.cpu()
        # Each token was scored by one data-parallel rank; all others hold zeros.
        torch.distributed.all_reduce(flat, group=self.runtime.control_group)
        return flat

    def _run(
        self, batch: Batch, loss_function: LossFunction | None, forward_only: bool, progress: Progress | None
    ) -> list[Any]:
        """One pass of this rank's share through the pipeline schedule.

        Returns:
            On the last stage: per micro-batch `PositionedValues` without a loss, else the metrics.
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

        pipeline = self._bubbles.start_pass(len(rows), forward_only) if self._bubbles is not None else {}
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
        for observe in self._observers:
            observe(microbatch)
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
        values = self._head.read(microbatch, output)
        if microbatch.own is not None:
            total, group = len(microbatch.flat_index), parallel_state.get_context_parallel_group()
            values = tuple(join(part, microbatch.own, total, group, sum_gradients=False) for part in values)
        if loss_function is None:
            return microbatch.flat_index, values[0]
        loss, metrics = loss_function(microbatch, *values)
        # With zero counted tokens megatron-core leaves the gradient as it is: the weights are already normalised.
        return loss, torch.zeros((), dtype=torch.int64, device=loss.device), metrics
