"""The trainer's end of a weight sync: connect once, then `sync()` after every update.

sync = connect("shm", rank=rank, client=FleetClient(fleet), source=source, barrier=barrier, segment=name, workers=1)
report = sync.sync()      # on every trainer rank
sync.resend(client)       # on rank 0, for an engine that was restarted
sync.shutdown()
"""

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from vllm.distributed.weight_transfer.base import TrainerInitInfo, TrainerWeightTransferEngine, VLLMWeightSyncClient
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

from rollout.weight_transfer.shm import (
    ShardedWeightSource,
    ShmTrainerInitInfo,
    ShmTrainerWeightTransferEngine,
    register_shm_transfer,
)


@dataclass(frozen=True)
class SyncReport:
    """What one sync moved, and the wall time from the first copy until the engines held the weights."""

    bytes: int
    seconds: float

    @property
    def gigabytes_per_second(self) -> float:
        return self.bytes / self.seconds / 1e9


class WeightConnection:
    """A trainer rank's connection to the engines behind its client."""

    def __init__(self, engine: TrainerWeightTransferEngine, source: ShardedWeightSource) -> None:
        self._engine = engine
        self._bytes = sum(math.prod(meta.shape) * meta.dtype.itemsize for meta in source.metadata())

    def sync(self) -> SyncReport:
        """Send the source's current weights; called on every trainer rank, returns when the engines hold them."""
        start = time.perf_counter()
        self._engine.send_weights()
        return SyncReport(self._bytes, time.perf_counter() - start)

    def resend(self, client: VLLMWeightSyncClient) -> SyncReport:
        """Give the weights of the last sync to restarted engines; called on rank 0 alone.

        Args:
            client: of these engines.

        Raises:
            RuntimeError: with `ipc` and `nccl`, which need all trainer ranks: there, `connect` and `sync` again.
        """
        if not isinstance(self._engine, ShmTrainerWeightTransferEngine):
            raise RuntimeError(
                "Weights were sent over ipc or nccl, so a restarted engine gets them only from all trainer ranks "
                "together: connect and sync again, or use rollout.weight_sync: shm."
            )
        start = time.perf_counter()
        self._engine.resend(client)
        return SyncReport(self._bytes, time.perf_counter() - start)

    def shutdown(self) -> None:
        """Release the connection (and, on rank 0 with `shm`, delete the segment)."""
        self._engine.shutdown()


def segment_name(run_dir: str) -> str:
    """The shared memory segment of a run: the same in a restarted run, which replaces one that a crash left behind."""
    return "megatron-rl-" + hashlib.sha256(run_dir.encode()).hexdigest()[:16]


def connect(
    backend: str,
    *,
    rank: int,
    client: VLLMWeightSyncClient,
    source: ShardedWeightSource,
    barrier: Callable[[], None],
    segment: str,
    workers: int,
) -> WeightConnection:
    """Connect this trainer rank to the engines; called on every rank, and again whenever engines were replaced.

    Args:
        backend: shm | ipc | nccl.
        rank: of this trainer.
        client: of the engines; used on rank 0 alone.
        source: this rank's weights.
        barrier: waits for all trainer ranks.
        segment: name of the shared memory (shm), see `segment_name`.
        workers: number of engine processes behind the client (nccl).

    Raises:
        ValueError: for another backend.
    """
    register_shm_transfer()
    info = _init_info(backend, rank, barrier, segment, workers)
    return WeightConnection(WeightTransferTrainerFactory.trainer_init(info, client=client, source=source), source)


def _init_info(backend: str, rank: int, barrier: Callable[[], None], segment: str, workers: int) -> TrainerInitInfo:
    if backend == "shm":
        return ShmTrainerInitInfo(segment=segment, barrier=barrier, rank=rank)
    if backend == "ipc":
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

        return IPCTrainerInitInfo(rank=rank)
    if backend == "nccl":
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
        from vllm.utils.network_utils import get_ip, get_open_port

        # Only the sender opens the rendezvous, so the other ranks' address and port are never read.
        return NCCLTrainerInitInfo(
            master_address=get_ip(), master_port=get_open_port(), world_size=1 + workers, rank=rank
        )
    raise ValueError(f"weight sync backend {backend!r} is not one of shm, ipc, nccl")
