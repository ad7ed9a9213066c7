"""Joining and leaving the process groups of the trainer."""

import datetime
import os
from dataclasses import dataclass

import torch
from torch.distributed import Store

from megatron_rl.config import Config, ConfigError
from megatron_rl.config.model_fit import check_world_size
from megatron_rl.distributed.device import check_device, cores, on_gpu
from rollout.tcp_store import bind_process_groups, bound_store

LONGEST_WAIT = datetime.timedelta(hours=12)
"""Ranks wait for the driver while it generates, which may take long."""


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


def initialize(config: Config) -> Runtime:
    """Join the process group that torchrun (or Slurm) started and set up megatron-core's parallel groups.

    Raises:
        ConfigError: when this machine or the number of processes does not fit the config.
    """
    check_device(config)
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    check_world_size(config, world_size)
    store = _meeting_point(world_size)
    if on_gpu():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.distributed.init_process_group("nccl", device_id=device, store=store, rank=rank, world_size=world_size)
    else:
        device = torch.device("cpu")
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", max(cores() // world_size, 1))))
        torch.distributed.init_process_group(
            "gloo", timeout=LONGEST_WAIT, store=store, rank=rank, world_size=world_size
        )
        from megatron_rl.megatron_patches import cpu_backend

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
    control = torch.distributed.new_group(backend="gloo", timeout=LONGEST_WAIT)
    return Runtime(rank, world_size, device, control)


def _meeting_point(world_size: int) -> Store | None:
    """The store by which the processes find each other; None: the one that their launcher's variables name.

    A process that is alone makes one on a port of its own, so any number of them may share a machine.

    Raises:
        ConfigError: when there are several processes, and nothing says where they meet.
    """
    bind_process_groups()
    if {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        return None
    if world_size > 1:
        raise ConfigError(
            f"WORLD_SIZE={world_size}, but MASTER_ADDR and MASTER_PORT do not say where the trainer processes meet; "
            "start them with megatron-rl train, torchrun or srun, which set both, or set them yourself."
        )
    return bound_store("127.0.0.1", 0, is_master=True)


def shutdown() -> None:
    """Leave the process groups."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
