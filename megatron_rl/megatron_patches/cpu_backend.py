"""Lets megatron-core run on CPU tensors over gloo.

megatron-core asks for CUDA in a few fixed places: explicit `device="cuda"` arguments, `torch.cuda.current_device()`,
its RNG tracker, CUDA type names in the optimizer, and streams. This module answers those with their CPU meaning.
Nothing of megatron-core's schedules or optimizers is replaced. Call `install` once, before building a model.

DDP leaves out collectives of one rank: a rank's shard is then the buffer itself, and gloo would copy every parameter
and gradient twice. (One crash was seen with such a call on the stack; its cause is not known.)
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed import ProcessGroup
from torch.overrides import TorchFunctionMode

from megatron_rl.megatron_patches import versions
from megatron_rl.megatron_patches.versions import patch


class _CudaMeansCpu(TorchFunctionMode):
    """Redirects CUDA device arguments of torch calls to the CPU, and reports CUDA type names for CPU tensors."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if kwargs:
            device = kwargs.get("device")
            if device is not None and (isinstance(device, int) or str(device).startswith("cuda")):
                kwargs = {**kwargs, "device": "cpu"}
        else:
            kwargs = {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.")
        if func is torch.Tensor.to and len(args) > 1 and str(args[1]).startswith("cuda"):
            args = (args[0], "cpu", *args[2:])
        return func(*args, **kwargs)


class _NoStream:
    """A CUDA stream or event on a device that runs everything in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        pass

    def record_event(self) -> "_NoStream":
        return self

    def synchronize(self) -> None:
        pass


_mode: _CudaMeansCpu | None = None


def install() -> None:
    """Make megatron-core's CUDA calls mean the CPU, in this process and thread. Idempotent.

    Raises:
        ConfigError: for a megatron-core version that is not supported.
    """
    global _mode
    if _mode is not None:
        return
    versions.check()
    _answer_for_cuda()
    for apply in PATCHES:
        apply()
    _mode = _CudaMeansCpu()
    _mode.__enter__()


def _answer_for_cuda() -> None:
    """Give torch's CUDA functions that megatron-core calls their meaning on a CPU."""
    cuda: Any = torch.cuda
    cuda.current_device = lambda: torch.device("cpu")
    cuda.synchronize = lambda *args, **kwargs: None
    cuda.empty_cache = lambda: None
    cuda.memory_allocated = lambda *args: 0
    cuda.manual_seed = torch.manual_seed
    cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    cuda._lazy_call = lambda function, **kwargs: function()
    cuda.Stream = cuda.Event = _NoStream
    cuda.current_stream = cuda.default_stream = lambda *args: _NoStream()
    cuda.stream = lambda stream: contextlib.nullcontext()


@patch(">=0.16.1,<0.20")
def use_the_cpu_generator() -> None:
    """The tracker of random number generators reads and sets the CPU's state."""
    import megatron.core.tensor_parallel.random as megatron_random

    rng: Any = megatron_random
    rng._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    rng._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)


@patch(">=0.16.1,<0.17")
def define_te_general_gemm() -> None:
    """Routers ask for it, but it is imported with Transformer Engine only; later versions set it to None themselves."""
    from megatron.core.transformer.moe import moe_utils

    moe: Any = moe_utils
    moe.te_general_gemm = None


@patch(">=0.16.1,<0.20")
def keep_sizes_on_the_host() -> None:
    """The dispatcher of experts converts the sizes of its all-to-alls only where it finds them on a GPU."""
    from megatron.core.transformer.moe import token_dispatcher

    dispatcher: Any = token_dispatcher
    dispatcher.maybe_move_tensor_to_cpu = _as_on_the_host


def _as_on_the_host(values: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """What tensors on the host are to the dispatcher of experts: sizes of all-to-alls must not be tensors."""
    return values.numpy() if as_numpy and torch.is_tensor(values) else values


@patch(">=0.16.1,<0.20")
def leave_out_lonely_collectives() -> None:
    """DDP does not copy parameters and gradients within one rank."""
    from megatron.core.distributed import param_and_grad_buffer

    ddp: Any = param_and_grad_buffer
    coalesce = ddp._coalescing_manager

    def coalesce_unless_alone(group: ProcessGroup, **kwargs: Any) -> Any:
        return contextlib.nullcontext() if group.size() == 1 else coalesce(group, **kwargs)

    ddp._coalescing_manager = coalesce_unless_alone
    ddp.dist_all_gather_func = _unless_alone(ddp.dist_all_gather_func)
    ddp.dist_reduce_scatter_func = _unless_alone(ddp.dist_reduce_scatter_func)


def _unless_alone(collective: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, group: ProcessGroup, **kwargs: Any) -> Any:
        return None if group.size() == 1 else collective(*args, group=group, **kwargs)

    return call


PATCHES = (
    use_the_cpu_generator,
    define_te_general_gemm,
    keep_sizes_on_the_host,
    leave_out_lonely_collectives,
)
