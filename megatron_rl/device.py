"""CPU and CUDA bring-up: the one module that asks which device it is on.

Everything that differs between a laptop and a GPU node is answered here: backends of the process groups, the
environment of trainer and engine processes, the layer implementation, where tensors live.
"""

import datetime
import importlib.util
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from megatron_rl import megatron_version
from megatron_rl.config import Config, ConfigError
from megatron_rl.config.layout import check_world_size
from rollout.bound_store import bind_process_groups

if TYPE_CHECKING:
    from drafter.fill import ThreadFill
    from drafter.slices import SliceRunner
    from rollout.engine import EngineEnvironment

# glibc returns large blocks to the kernel after each step and the page faults dominate small models; keep them instead.
MALLOC_TUNABLES = (
    "glibc.malloc.mmap_threshold=8589934592:glibc.malloc.trim_threshold=17179869184:glibc.malloc.top_pad=268435456"
)
AMX_PROBE = """
import torch, torch._C
torch.set_num_threads(1)
supported = torch.cpu._is_amx_tile_supported()
if supported:
    torch.cpu._init_amx()
    a = torch.ones(64, 64, dtype=torch.bfloat16)
    assert (a @ a)[0, 0] == 64
print(int(supported))
"""


@dataclass(frozen=True)
class Runtime:
    """This process's place in the trainer."""

    rank: int
    world_size: int
    device: torch.device
    control_group: torch.distributed.ProcessGroup
    """A gloo group over all trainer processes, for small host-side messages."""

    @property
    def is_driver(self) -> bool:
        """Rank 0 owns the fleet, the data order and the logs."""
        return self.rank == 0


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
    megatron_version.check()
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
    _check_quantization(config)
    backend = config.rollout.weight_sync
    allowed = ("auto", "ipc", "nccl") if on_gpu() else ("auto", "shm")
    if backend not in allowed:
        raise ConfigError(
            f"rollout.weight_sync={backend} does not work on this machine; use one of {', '.join(allowed)}."
        )


def _check_quantization(config: Config) -> None:
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


def engine_environment(config: Config, vocab_limit: int) -> "EngineEnvironment":
    """How engines start on this machine. `vocab_limit`: token ids from here on are never sampled.

    Raises:
        ConfigError: when `rollout.quantization` does not work here.
    """
    from rollout.engine import EngineEnvironment

    _check_quantization(config)
    environment = shared_environment()
    # The trainer sends the weights before the first request, so engines need not read them.
    vllm: dict[str, object] = {"load_format": "dummy"}
    shared: tuple[str, ...] = ()
    if on_gpu():
        gpus = float(config.rollout.tp_size)
        if config.rollout.placement == "colocated":
            # Ray must not reserve the devices that the trainer already uses; vLLM takes the share it is told to.
            gpus, shared = 0.0, _visible_gpus()
            vllm["gpu_memory_utilization"] = 0.5
            vllm["enable_sleep_mode"] = config.rollout.sleep > 0
        sync = "ipc" if config.rollout.placement == "colocated" else "nccl"
    else:
        gpus, sync = 0.0, "shm"
        share = cores() // (config.rollout.engines * config.rollout.tp_size)
        threads = config.rollout.threads or max(share, 1)
        environment |= {"OMP_NUM_THREADS": str(threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        environment |= {"VLLM_CPU_KVCACHE_SPACE": "1"}
        vllm["block_size"] = 32  # measured 8-10 % faster than the default 128
        if amx_usable() is False:
            environment["MEGATRON_RL_DISABLE_AMX"] = "1"
    if config.rollout.weight_sync != "auto":
        sync = config.rollout.weight_sync
    return EngineEnvironment(
        env=environment,
        gpus=gpus,
        dtype="float32" if config.model.precision == "fp32" else "bfloat16",
        weight_sync=sync,
        vocab_limit=vocab_limit,
        vllm=vllm,
        shared_gpus=shared,
    )


def _visible_gpus() -> tuple[str, ...]:
    """Ids of this node's GPUs, as CUDA_VISIBLE_DEVICES has them."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return tuple(chosen.split(",")) if chosen else tuple(map(str, range(torch.cuda.device_count())))


def idle_fill(runner: "SliceRunner") -> "ThreadFill":
    """How the waits of the training step are filled with slices on this machine's device."""
    from drafter.fill import CudaFill, ThreadFill

    return CudaFill(runner) if on_gpu() else ThreadFill(runner)


def amx_usable() -> bool | None:
    """Whether AMX tiles work: None without AMX, False when using them crashes (some virtual machines), True otherwise.

    The probe runs in a child process because a failing instruction kills the process that tries it.
    """
    if on_gpu() or not torch.cpu._is_amx_tile_supported():
        return None
    probe = subprocess.run([sys.executable, "-c", AMX_PROBE], capture_output=True, text=True, timeout=120)
    return probe.returncode == 0 and probe.stdout.strip() == "1"


def initialize(config: Config) -> Runtime:
    """Join the process group that torchrun (or Slurm) started and set up megatron-core's parallel groups.

    Raises:
        ConfigError: when this machine or the number of processes does not fit the config.
    """
    check_device(config)
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    check_world_size(config, world_size)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29531")
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    bind_process_groups()
    if on_gpu():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.distributed.init_process_group("nccl", device_id=device)
    else:
        device = torch.device("cpu")
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", max(cores() // world_size, 1))))
        # Ranks wait for the driver while it generates, which may take long.
        torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(hours=12))
        from megatron_rl import cpu_backend

        cpu_backend.install()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel = config.parallel
    parallel_state.initialize_model_parallel(
        parallel.tp_size,
        parallel.pp_size,
        context_parallel_size=parallel.cp_size,
        expert_model_parallel_size=parallel.ep_size,
        expert_tensor_parallel_size=1,
    )
    model_parallel_cuda_manual_seed(config.train.seed)
    control = torch.distributed.new_group(backend="gloo", timeout=datetime.timedelta(hours=12))
    return Runtime(rank, world_size, device, control)


def shutdown() -> None:
    """Leave the process groups."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
