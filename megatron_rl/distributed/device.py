"""CPU and CUDA bring-up: the one module that asks which device it is on.

Everything that differs between a laptop and a GPU node is answered here: backends of the process groups, the
environment of trainer and engine processes, the layer implementation, where tensors live.
"""

import importlib.util
import os

import torch
from torch.distributed import Store

from megatron_rl.config import Config, ConfigError
from megatron_rl.config.model_fit import check_world_size
from megatron_rl.megatron_patches import versions

# glibc returns large blocks to the kernel after each step and the page faults dominate small models; keep them instead.
MALLOC_TUNABLES = (
    "glibc.malloc.mmap_threshold=8589934592:glibc.malloc.trim_threshold=17179869184:glibc.malloc.top_pad=268435456"
)


def on_gpu() -> bool:
    """Whether this machine trains on CUDA devices."""
    return torch.cuda.device_count() > 0


def has_transformer_engine() -> bool:
    """Whether megatron-core can use Transformer Engine layers here."""
    return on_gpu() and importlib.util.find_spec("transformer_engine") is not None


def check_device(config: Config) -> None:
    """Refuse what this machine cannot do.

    Raises:
        ConfigError: naming the key or the package, and the remedy.
    """
    versions.check()
    if config.model.precision == "fp8" and not has_transformer_engine():
        missing = "Transformer Engine is not installed" if on_gpu() else "this machine has no CUDA device"
        raise ConfigError(
            f"model.precision=fp8 needs a GPU and Transformer Engine, but {missing}; use bf16 or fp32, or install "
            "megatron-rl[cuda] on a GPU node."
        )
    if config.parallel.sequence_parallel and not has_transformer_engine():
        raise ConfigError(
            "parallel.sequence_parallel=true needs Transformer Engine's norm layers on a GPU; set it to false here."
        )
    check_quantization(config)
    backend = config.rollout.weight_sync
    allowed = ("auto", "ipc", "nccl") if on_gpu() else ("auto", "shm")
    if backend not in allowed:
        raise ConfigError(
            f"rollout.weight_sync={backend} does not work on this machine; use one of {', '.join(allowed)}."
        )


CPU_HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Sizes of attention heads that vLLM's attention for CPUs has."""


def check_head_dim(config: Config, head_dim: int) -> None:
    """Refuse a model whose heads the engines have no attention for.

    Raises:
        ConfigError: naming the size.
    """
    if not on_gpu() and head_dim not in CPU_HEAD_DIMS:
        raise ConfigError(
            f"model.path={config.model.path!r} has attention heads of {head_dim}, but vLLM on a CPU computes heads of "
            f"{', '.join(map(str, CPU_HEAD_DIMS))} only; use another model, or a GPU."
        )


def check_quantization(config: Config) -> None:
    """Refuse precisions of the engines that this machine cannot compute.

    Raises:
        ConfigError: naming the key and the remedy.
    """
    for kind in config.rollout.precisions:
        if kind == "none":
            continue
        if kind != "int8" and not on_gpu():
            raise ConfigError(f"rollout.quantization={kind} needs a GPU, but this machine has none; use int8 or none.")
        if on_gpu() and config.model.precision == "fp32":
            raise ConfigError(f"rollout.quantization={kind} on a GPU needs bf16 activations; set model.precision=bf16.")
        if not on_gpu() and not torch.cpu._is_vnni_supported():
            raise ConfigError(
                "rollout.quantization=int8 needs a CPU with AVX-512 VNNI, which this one lacks: its products of int8 "
                "numbers would overflow; use none."
            )


def default_world_size(config: Config) -> int:
    """Trainer processes to start here: `dp_size` null means one replica on a CPU, all visible GPUs otherwise.

    Raises:
        ConfigError: when the GPUs do not suffice.
    """
    model_size = config.parallel.model_size
    if config.parallel.dp_size is not None:
        world_size = model_size * config.parallel.dp_size
    elif on_gpu():
        world_size = max(torch.cuda.device_count() // model_size, 1) * model_size
    else:
        world_size = model_size
    if on_gpu() and world_size > torch.cuda.device_count():
        raise ConfigError(
            f"parallel.tp_size x pp_size x cp_size x dp_size = {world_size} but this machine shows "
            f"{torch.cuda.device_count()} GPUs; lower them, or use launch/multinode.sh."
        )
    check_world_size(config, world_size)
    return world_size


def cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0))


def process_environment(config: Config, processes_per_node: int) -> dict[str, str]:
    """Environment of each trainer process, to be set before it starts.

    Args:
        config: the experiment.
        processes_per_node: trainer processes that share this machine.

    On a CPU machine trainer and engine share the cores, so waiting threads must sleep instead of spin, and thread
    counts must add up to the cores.
    """
    threads = config.train.threads or max(cores() // processes_per_node, 1)
    return {"OMP_NUM_THREADS": str(threads), **shared_environment()}


def shared_environment() -> dict[str, str]:
    """What the environments of trainer and engine processes have in common."""
    environment = {"TOKENIZERS_PARALLELISM": "false", "GLIBC_TUNABLES": MALLOC_TUNABLES}
    if on_gpu():
        environment["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    else:
        environment |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}
    return environment


def shared_store() -> Store:
    """Where the processes of the process group meet, by a connection of its own: a call that waits delays no other."""
    return torch.distributed.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
