"""Hands the trainer's weights to the fleet, proves that they arrived, and says how fast."""

import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from vllm.distributed.weight_transfer.base import ParamMeta

from megatron_rl.config import Config
from megatron_rl.distributed.coordinator import Coordinator
from megatron_rl.distributed.runtime import Runtime
from megatron_rl.models.weights import PolicyWeights
from rollout.fleet.weight_client import FleetClient
from rollout.weight_transfer.checksum import differing, source_checksums
from rollout.weight_transfer.connection import WeightConnection, connect, segment_name
from rollout.weight_transfer.shm import ShardedWeightSource

if TYPE_CHECKING:
    from rollout.fleet.fleet import RolloutFleet
    from rollout.quantization.int8 import Rounding

log = logging.getLogger(__name__)
MEMCPY_SAMPLE_BYTES = 2**28


class PolicyWeightSource(ShardedWeightSource):
    """The policy's weights as vLLM's weight transfer reads them."""

    def __init__(self, weights: PolicyWeights) -> None:
        self._weights = weights

    def metadata(self) -> list[ParamMeta]:
        """Name, dtype and full shape of every tensor, in the order of iteration."""
        return [ParamMeta(meta.name, meta.dtype, meta.shape) for meta in self._weights.metadata()]

    def pieces(self) -> Iterator[tuple[str, tuple[slice, ...], torch.Tensor]]:
        """What this rank holds, without communication."""
        return self._weights.pieces()

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(self._weights)


class WeightSync:
    """Connects trainer ranks and fleet; all methods but `restore` are called on every rank."""

    def __init__(
        self,
        config: Config,
        runtime: Runtime,
        weights: PolicyWeights,
        backend: str,
        fleet: "RolloutFleet | None",
        coordinator: Coordinator,
    ) -> None:
        """Connect all engines.

        Args:
            config: the experiment.
            runtime: this process's place.
            weights: the policy's.
            backend: shm, ipc or nccl.
            fleet: the driver's engines, which are up; None elsewhere.
            coordinator: brings all ranks together when an engine has to get its weights again.
        """
        self._config, self._runtime, self._fleet = config, runtime, fleet
        self._source = PolicyWeightSource(weights)
        self._backend, self._coordinator = backend, coordinator
        self._memcpy = _memcpy_gb_per_s(self._source) if runtime.is_driver else 0.0
        self._connection = self._connect()
        self._stale = False
        self._restarted: list[int] = []
        coordinator.register("restore a restarted engine", self._restore_from_all_ranks)

    def _connect(self, engines: list[int] | None = None) -> WeightConnection:
        config = self._config
        count = config.rollout.engines if engines is None else len(engines)
        return connect(
            self._backend,
            rank=self._runtime.rank,
            client=FleetClient(self._fleet, engines) if self._fleet is not None else None,
            source=self._source,
            barrier=lambda: torch.distributed.barrier(group=self._runtime.control_group),
            # Two runs may have the same relative run_dir in different folders.
            segment=segment_name(str(Path(config.run_dir).resolve())),
            workers=count * config.rollout.tp_size,
        )

    def sync(self, version: int) -> dict[str, float]:
        """Send the current weights to all engines as policy `version`.

        Returns:
            On the driver the speed in GB/s, beside a plain memory copy's, and what int8 made of the weights; elsewhere
            an empty dict.

        Raises:
            RuntimeError: with `rollout.verify_weights`, when an engine does not hold the trainer's bits.
        """
        if self._config.rollout.sleep:
            # Where all ranks can be called: an engine that died while it slept needs them to get its weights.
            self._coordinator.drive(lambda: self._fleet.wake_up() if self._fleet is not None else None)
        if self._stale:
            self._connection.shutdown()
            self._connection, self._stale = self._connect(), False
        report = self._connection.sync()
        if self._config.rollout.sleep:
            self._coordinator.drive(lambda: self._fleet.wake_up_fully() if self._fleet is not None else None)
        if self._fleet is not None:
            self._fleet.set_policy_version(version)
        if self._config.rollout.verify_weights:
            self.verify()
        if not self._runtime.is_driver:
            return {}
        metrics = {
            "weight_sync/gb_per_s": report.gigabytes_per_second,
            "weight_sync/memcpy_gb_per_s": self._memcpy,
        }
        if self._fleet is not None and "int8" in self._config.rollout.precisions:
            metrics |= rounding_metrics(self._fleet.weight_rounding(), self._config.rollout.quantization_max_error)
        return metrics

    def restore(self, engine: int) -> None:
        """Give a restarted engine the current weights; the fleet calls this on the driver.

        Raises:
            RuntimeError: with ipc and nccl, which need all ranks, while they train beside the generation.
        """
        assert self._fleet is not None
        if self._backend == "shm":
            self._connection.resend(FleetClient(self._fleet, [engine]))
        elif self._config.rollout.async_steps and threading.current_thread() is not threading.main_thread():
            raise RuntimeError(
                f"rollout engine {engine} died while the trainer works, and over {self._backend} all trainer processes "
                "together have to give it the weights; start the job again, it resumes."
            )
        else:
            self._restarted = [engine]
            self._coordinator.call("restore a restarted engine")

    def _restore_from_all_ranks(self) -> None:
        connection = self._connect(self._restarted)
        connection.sync()
        connection.shutdown()
        self._stale = True  # the standing connection still counts on the dead engine

    def verify(self) -> None:
        """Compare checksums of what every engine multiplies with against the trainer's shards.

        Raises:
            RuntimeError: on the driver, naming the tensors that differ.
        """
        gathered: list[dict[str, int]] | None = [{}] * self._runtime.world_size if self._runtime.is_driver else None
        torch.distributed.gather_object(self._partial_sums(), gathered, dst=0, group=self._runtime.control_group)
        if self._fleet is None or gathered is None:
            return
        expected: dict[str, int] = {}
        for part in gathered:
            for name, value in part.items():
                expected[name] = (expected.get(name, 0) + value) % 2**64
        for number, held in enumerate(self._fleet.checksums()):
            wrong = differing(expected, held)
            if wrong:
                raise RuntimeError(
                    f"engine {number} does not hold the trainer's weights: {len(wrong)} of {len(expected)} tensors "
                    f"differ, the first is {wrong[0]}."
                )

    def _partial_sums(self) -> dict[str, int]:
        shapes = {meta.name: meta.shape for meta in self._source.metadata()}
        return source_checksums(self._source.pieces(), shapes)

    def shutdown(self) -> None:
        """Release the connection."""
        self._connection.shutdown()


def rounding_metrics(parts: Sequence[Mapping[str, "Rounding"]], bound: float) -> dict[str, float]:
    """`quantization/*` of `docs/metrics.md`; a warning for errors over the bound.

    Args:
        parts: per worker, what int8 made of each of its layers.
        bound: largest share of a layer's norm that may be lost without a warning.

    A layer cannot change its precision in a running engine: compiled code and CUDA graphs hold its tensors' addresses.
    """
    layers = [(rounding, name) for part in parts for name, rounding in part.items()]
    if not layers:
        return {}
    worst, name = max(layers)
    if worst.error > bound:
        log.warning(
            "%s loses %.0f %% of its weights' norm in int8, more than rollout.quantization_max_error=%g; restart with "
            "it among rollout.quantization_skip, or calibrate anew (megatron-rl quantize profile).",
            name,
            100 * worst.error,
            bound,
        )
    return {
        "quantization/weight_error_mean": sum(rounding.error for rounding, _ in layers) / len(layers),
        "quantization/weight_error_max": worst.error,
        "quantization/clipped_fraction": sum(rounding.clipped for rounding, _ in layers) / len(layers),
    }


def _memcpy_gb_per_s(source: PolicyWeightSource) -> float:
    """Speed of one plain copy of as many bytes as a sync moves (up to a bound), median of five, in GB/s."""
    total = sum(meta.dtype.itemsize * torch.Size(meta.shape).numel() for meta in source.metadata())
    origin = torch.zeros(min(total, MEMCPY_SAMPLE_BYTES), dtype=torch.uint8)
    target = torch.zeros_like(origin)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        target.copy_(origin)
        seconds.append(time.perf_counter() - start)
    return origin.nbytes / sorted(seconds)[2] / 1e9
