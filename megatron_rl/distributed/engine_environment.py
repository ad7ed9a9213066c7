"""How engines start on this machine."""

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import torch

from megatron_rl.config import Config
from megatron_rl.distributed.device import check_quantization, cores, on_gpu, shared_environment

if TYPE_CHECKING:
    from rollout.engine.engine_arguments import EngineEnvironment


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


def engine_environment(config: Config, vocab_limit: int, end_ids: tuple[int, ...]) -> "EngineEnvironment":
    """How engines start on this machine.

    Args:
        config: the experiment.
        vocab_limit: token ids from here on are never sampled.
        end_ids: token ids that end a response.

    Raises:
        ConfigError: when `rollout.quantization` does not work here.
    """
    from rollout.engine.engine_arguments import EngineEnvironment

    check_quantization(config)
    environment = shared_environment()
    # The trainer sends the weights before the first request, so engines need not read them.
    vllm: dict[str, object] = {"load_format": "dummy"}
    shared: tuple[str, ...] = ()
    if on_gpu():
        gpus = float(config.rollout.tp_size)
        if config.rollout.placement == "colocated":
            # Ray must not reserve the devices that the trainer already uses; vLLM takes the share that it is given.
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
        end_ids=end_ids,
        vllm=vllm,
        shared_gpus=shared,
    )


def _visible_gpus() -> tuple[str, ...]:
    """Ids of this node's GPUs, as CUDA_VISIBLE_DEVICES has them."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return tuple(chosen.split(",")) if chosen else tuple(map(str, range(torch.cuda.device_count())))


def amx_usable() -> bool | None:
    """Whether AMX tiles work: None without AMX, False when using them crashes (some virtual machines), True otherwise.

    The probe runs in a child process because a failing instruction kills the process that tries it.
    """
    if on_gpu() or not torch.cpu._is_amx_tile_supported():
        return None
    probe = subprocess.run([sys.executable, "-c", AMX_PROBE], capture_output=True, text=True, timeout=120)
    return probe.returncode == 0 and probe.stdout.strip() == "1"
