"""Drives the weight sync of several engines at once, and continues when one of them dies during it."""

from typing import Any

import ray
from ray.exceptions import RayActorError
from vllm.distributed.weight_transfer.base import (
    WeightTransferInitRequest,
    WeightTransferUpdatePayload,
    WeightTransferUpdateRequest,
)

from rollout.fleet.fleet import RolloutFleet


class FleetClient:
    """vLLM's `VLLMWeightSyncClient` protocol over the given engines of a fleet (default: all), in parallel.

    An engine that dies is restarted by the fleet, whose `on_restart` gives it the weights; it is left out of the rest
    of the update.
    """

    def __init__(self, fleet: RolloutFleet, engines: list[int] | None = None) -> None:
        self._fleet = fleet
        self._engines = list(range(fleet.engines)) if engines is None else engines
        self._restarted: set[int] = set()

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Connect; with NCCL every engine gets ranks of its own in the transfer's group."""
        calls: dict[int, tuple[Any, ...]] = {}
        for number, index in enumerate(self._engines):
            info = dict(init_info)
            if "rank_offset" in info:
                info["rank_offset"] += number * self._fleet.workers_per_engine
            calls[index] = ("init_weight_transfer_engine", WeightTransferInitRequest(init_info=info))
        self._run(calls)
        retry = {index: calls[index] for index in self._restarted}
        self._restarted = set()
        self._run(retry)

    def start_weight_update(self) -> None:
        """Begin an update."""
        self._restarted = set()
        self._run(dict.fromkeys(self._engines, ("start_weight_update",)))

    def update_weights(self, update_info: WeightTransferUpdatePayload) -> None:
        """Receive weights."""
        request = WeightTransferUpdateRequest(update_info=update_info)
        self._run(dict.fromkeys(self._engines, ("update_weights", request)))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """End an update; the version is the fleet's `set_policy_version`, so `weight_version` is not used."""
        self._run(dict.fromkeys(self._engines, ("finish_weight_update",)))

    def _run(self, calls: dict[int, tuple[Any, ...]]) -> None:
        pending = {i: self._fleet.call(i, *call) for i, call in calls.items() if i not in self._restarted}
        for index, reference in pending.items():
            try:
                ray.get(reference)
            except RayActorError:
                self._fleet.restart(index)
                self._restarted.add(index)
