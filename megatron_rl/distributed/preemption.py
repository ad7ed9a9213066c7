"""SIGTERM asks a run to stop: it finishes the step, saves, and leaves."""

import signal
from types import FrameType

import torch

from megatron_rl.distributed.runtime import Runtime


class StopRequest:
    """Takes SIGTERM from now on. The processes need not all get it, nor in the same step: they agree."""

    def __init__(self, runtime: Runtime) -> None:
        """To be called from the main thread, after everything that sets a handler of its own (Ray does)."""
        self._group = runtime.control_group
        self._requested = False
        self._before = signal.signal(signal.SIGTERM, self._request)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self._requested = True

    def agreed(self) -> bool:
        """Whether any process has been asked to stop; the same answer on all ranks, which all have to call this."""
        requested = torch.tensor(int(self._requested))
        torch.distributed.all_reduce(requested, torch.distributed.ReduceOp.MAX, group=self._group)
        return bool(requested)

    def close(self) -> None:
        """Put the handler back that was there before."""
        signal.signal(signal.SIGTERM, self._before)
