"""Fills the time of one blocking operation with slices, on a CPU and on a CUDA device.

The operation (a receive from another pipeline stage) goes to a helper thread; slices run in the calling thread until
it is done. `is_completed()` of gloo's requests cannot be polled instead: it stays False until `wait()` is called.

On CUDA the operation blocks its thread as well: megatron-core synchronises the device after it exchanged shapes
(`variable_seq_lengths`) and after batched exchanges. So the same loop works, with slices on a low-priority stream.
Without these two options the host would run ahead of the device, find no waits, and fill nothing.
"""

import queue
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

from drafter.idle_time.slices import Filled, Slice, SliceRunner, run_directly

Operation = Callable[[], Any]


class _Call:
    """One operation on its way through the helper thread."""

    def __init__(self, operation: Operation) -> None:
        self.operation = operation
        self.over = threading.Event()
        self.result: Any = None
        self.error: BaseException | None = None
        self.end = 0.0

    def pending(self, seconds: float) -> bool:
        return not self.over.wait(seconds if seconds < threading.TIMEOUT_MAX else None)


class ThreadFill:
    """Runs slices while a helper thread waits. One helper serves all calls, one at a time."""

    def __init__(self, runner: SliceRunner) -> None:
        self.runner = runner
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._helper: threading.Thread | None = None

    def settle(self) -> None:
        """Return when the computation that the calling thread has started is over: a wait begins only then."""

    def during(self, operation: Operation, expected: float) -> tuple[Any, float, Filled]:
        """Run `operation` and fill its time.

        Args:
            operation: blocks until the other side is ready; runs in the helper thread.
            expected: seconds that it should take; 0 when nothing is known.

        Returns:
            The operation's result, the time of the runner's clock at which it was done, and the slices that ran.

        Raises:
            Exception: whatever the operation or a slice raises. After a slice's exception the operation is still
                running: the process group cannot be used any more, as after any error in a training step.
        """
        if self._helper is None:
            # A daemon: a receive that never ends must not keep the process from exiting.
            self._helper = threading.Thread(target=self._serve, name="bubble-wait", daemon=True)
            self._helper.start()
        call = _Call(operation)
        self._calls.put(call)
        filled = self.runner.run_while(call.pending, expected)
        if call.error is not None:
            raise call.error
        return call.result, call.end, filled

    def close(self) -> None:
        """Let the helper thread end; the next call would start another."""
        if self._helper is not None:
            self._calls.put(None)
            self._helper = None

    def _serve(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                call.result = call.operation()
            except BaseException as error:  # handed to the thread that waits for it
                call.error = error
            call.end = self.runner.clock()
            call.over.set()


class CudaFill(ThreadFill):
    """Slices go to a stream of their own; the operation keeps the caller's device and stream.

    The stream has the lowest priority there is, which is also that of the default stream: a slice that is still running
    when the wait ends yields to the training step only if the latter runs on a stream of higher priority.
    """

    def __init__(self, runner: SliceRunner) -> None:
        super().__init__(runner)
        self._stream = torch.cuda.Stream(priority=0)  # the largest number, so the lowest priority
        runner.execute = self._execute

    def settle(self) -> None:
        """Wait for the compute stream, so that the runner's clock sees when this stage ran out of work."""
        torch.cuda.current_stream().synchronize()

    def during(self, operation: Operation, expected: float) -> tuple[Any, float, Filled]:
        """See `ThreadFill.during`. Device and stream belong to a thread, so the helper is given the caller's."""
        device, stream = torch.cuda.current_device(), torch.cuda.current_stream()

        def same_place() -> Any:
            with ExitStack() as stack:
                stack.enter_context(torch.cuda.device(device))
                stack.enter_context(torch.cuda.stream(stream))
                return operation()

        return super().during(same_place, expected)

    def _execute(self, piece: Slice) -> None:
        with torch.cuda.stream(self._stream):
            run_directly(piece)
        # One slice at a time: it is the unit in which the device is given back, and its duration is measured.
        self._stream.synchronize()
