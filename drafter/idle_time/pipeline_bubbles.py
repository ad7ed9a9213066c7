"""Fills pipeline bubbles: a `P2PCommunicator` for megatron-core's schedules that runs slices while a stage waits.

    communicator = BubbleCommunicator(parallel_state.get_pipeline_model_parallel_group(), model.config, fill)
    config.finalize_model_grads_func = communicator.flushing(finalize_model_grads)
    get_forward_backward_func()(..., **communicator.start_pass(num_microbatches, forward_only))
    stats = communicator.take_stats()

The schedules take the communicator as an argument, so nothing of megatron-core is replaced; what is computed and
sent, and in which order, stays as it is. Served are one-forward-one-backward and interleaved schedules, with and
without `variable_seq_lengths`; with `overlap_p2p_comm` the schedule itself waits, and those waits stay unfilled.
"""

import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.process_groups_config import ProcessGroupCollection

from drafter.idle_time.slices import Filled
from drafter.idle_time.timeline import Timeline
from drafter.idle_time.wait_filler import Operation, ThreadFill

GROUPS = ("tp", "pp", "cp", "embd", "pos_embd", "dp_cp")
"""The process groups that the schedules ask for beside a communicator; the same that they take by themselves."""


@dataclass
class BubbleStats:
    """Seconds of this rank, summed over passes."""

    available: float = 0.0
    """Spent waiting for other stages."""
    filled: float = 0.0
    """Of these, spent in slices."""
    overrun: float = 0.0
    """Spent in slices after the wait was over: the delay of this stage that filling caused."""
    slices: int = 0


class WaitHistory:
    """Recent durations of each wait of a pass, to predict the next: by kind of pass and position in it."""

    def __init__(self, window: int = 5) -> None:
        self._window = window
        self._seen: dict[tuple[int, bool], list[deque[float]]] = {}
        self._current: list[deque[float]] = []
        self._position = 0

    def start_pass(self, microbatches: int, forward_only: bool) -> None:
        """Passes of equally many micro-batches make the same calls."""
        self._current = self._seen.setdefault((microbatches, forward_only), [])
        self._position = 0

    def expected(self) -> float:
        """Seconds that the next wait should last; 0 where nothing is known."""
        return statistics.median(self._current[self._position]) if self._position < len(self._current) else 0.0

    def observe(self, seconds: float) -> None:
        """Record the duration of the wait, and move on to the next."""
        if self._position == len(self._current):
            self._current.append(deque(maxlen=self._window))
        self._current[self._position].append(seconds)
        self._position += 1


def _ends(kind: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Marks a method that the schedules call right after a computation of this kind."""

    def decorate(method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def marked(self: "BubbleCommunicator", *arguments: Any, **options: Any) -> Any:
            self._note_computation(kind)
            return method(self, *arguments, **options)

        return marked

    return decorate


class BubbleCommunicator(P2PCommunicator):
    """Moves tensors between pipeline stages like its base class, and fills the waits when `filling`."""

    def __init__(self, pp_group: torch.distributed.ProcessGroup, config: ModelParallelConfig, fill: ThreadFill) -> None:
        """
        Args:
            pp_group: the stages of the pipeline.
            config: megatron-core's.
            fill: how waits are filled on this device.
        """
        super().__init__(pp_group, config)
        self.fill = fill
        self.filling = True
        """Whether waits are filled or only measured; set between passes, as the guard decides."""
        self.timeline = Timeline()
        self.history = WaitHistory()
        self.stats = BubbleStats()
        self._clock = self.fill.runner.clock
        self._free_since = self._agreed = self._clock()

    def start_pass(self, microbatches: int, forward_only: bool) -> dict[str, Any]:
        """To be called before each pass; returns arguments for megatron-core's schedule."""
        self.history.start_pass(microbatches, forward_only)
        self.fill.settle()
        self._free_since = self._clock()
        groups = ProcessGroupCollection.use_mpu_process_groups(list(GROUPS))
        return {"p2p_communicator": self, "pg_collection": groups}

    def take_stats(self) -> BubbleStats:
        """Seconds waited and filled in the passes since the last call."""
        stats, self.stats = self.stats, BubbleStats()
        return stats

    def flushing(self, finalize: Callable[..., Any]) -> Callable[..., Any]:
        """A `finalize_model_grads_func` that first waits, filling, until all stages have done their backward passes.

        The early ones would otherwise wait inside the first collective operation of `finalize` or of the optimizer.
        """

        @wraps(finalize)
        def flushed(*arguments: Any, **options: Any) -> Any:
            self._wait(self._meet)
            return finalize(*arguments, **options)

        return flushed

    def _meet(self) -> None:
        here = torch.zeros(1, device=torch.cuda.current_device())
        torch.distributed.all_reduce(here, group=self.pp_group)
        here.item()

    send_forward = _ends("forward")(P2PCommunicator.send_forward)
    send_forward_recv_forward = _ends("forward")(P2PCommunicator.send_forward_recv_forward)
    send_forward_recv_backward = _ends("forward")(P2PCommunicator.send_forward_recv_backward)
    send_backward = _ends("backward")(P2PCommunicator.send_backward)
    send_backward_recv_forward = _ends("backward")(P2PCommunicator.send_backward_recv_forward)
    send_backward_recv_backward = _ends("backward")(P2PCommunicator.send_backward_recv_backward)
    send_forward_backward_recv_forward_backward = _ends("forward + backward")(
        P2PCommunicator.send_forward_backward_recv_forward_backward
    )

    def _communicate(self, **arguments: Any) -> Any:
        exchange = super()._communicate
        if not arguments.get("wait_on_reqs", True):
            return exchange(**arguments)
        return self._wait(lambda: exchange(**arguments))

    def _communicate_shapes(self, *arguments: Any, **options: Any) -> Any:
        shapes = super()._communicate_shapes(*arguments, **options)
        self._agreed = self._clock()
        return shapes

    def _note_computation(self, kind: str) -> None:
        self.fill.settle()
        now = self._clock()
        self.timeline.add(kind, self._free_since, now)
        self._free_since = now

    def _wait(self, operation: Operation) -> Any:
        self.fill.settle()
        start = self._agreed = self._clock()
        if self.filling:
            result, end, filled = self.fill.during(operation, self.history.expected())
        else:
            result, end, filled = operation(), self._clock(), Filled()
        self._free_since = self._clock()
        self.history.observe(end - start)
        self.stats.available += end - start
        self.stats.filled += filled.seconds(start, end)
        self.stats.overrun += max(self._free_since - end, 0.0) if filled.spans else 0.0
        self.stats.slices += len(filled.spans)
        agreed = self._agreed if self._agreed > start else end
        self.timeline.add_wait(start, agreed, end, filled.spans)
        return result
