"""How the waits of a training step are filled on this machine's device."""

from typing import TYPE_CHECKING

from megatron_rl.distributed.device import on_gpu

if TYPE_CHECKING:
    from drafter.idle_time.slices import SliceRunner
    from drafter.idle_time.wait_filler import ThreadFill


def idle_fill(runner: "SliceRunner") -> "ThreadFill":
    """How the waits of the training step are filled with slices on this machine's device."""
    from drafter.idle_time.wait_filler import CudaFill, ThreadFill

    return CudaFill(runner) if on_gpu() else ThreadFill(runner)
