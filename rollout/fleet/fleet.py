"""The fleet: rollout engines as Ray actors, kept busy from one backlog, restarted when they die.

fleet = RolloutFleet(config, environment, model_path, on_restart)
for rollout in fleet.generate(requests): ...
fleet.shutdown()
"""

import logging
from collections.abc import Callable, Generator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import torch
from ray.exceptions import RayActorError
from torch import Tensor

from megatron_rl.config import Config
from rollout.engine.engine_arguments import EngineEnvironment, engine_arguments
from rollout.fleet.dispatcher import Dispatcher, EngineState, MoreRequests, no_more_requests
from rollout.fleet.engine_actor import create_engine, wait_until_up
from rollout.fleet.local_ray import start_ray
from rollout.fleet.mixed_precision import PrecisionCounts
from rollout.fleet.requests import deal, key_of
from rollout.speculation.head_weights import check_head, largest_head, pack_head
from rollout.speculation.speculation_settings import LearnedSpeculation
from rollout.types import Rollout, RolloutRequest, SpeculationCounts

if TYPE_CHECKING:
    from rollout.quantization.int8 import Rounding

logger = logging.getLogger(__name__)

_STOP_SECONDS = 10.0


class RolloutFleet:
    """`rollout.engines` engines holding the model at `model_path`."""

    def __init__(
        self,
        config: Config,
        environment: EngineEnvironment,
        model_path: str,
        on_restart: Callable[[int], None],
        wait: bool = True,
        drafter_path: str | None = None,
    ) -> None:
        """Start Ray if there is none, and the engines.

        To be called from a thread that lives as long as the fleet: the kernel ends Ray's processes with the thread that
        started them.

        Args:
            config: the experiment.
            environment: the machine.
            model_path: folder of the policy, in the Hugging Face format.
            on_restart: called with an engine's index when it has died and is up again with the weights of `model_path`,
                before it generates: the time to give it the current weights, through a `FleetClient` of that engine.
            wait: return when all engines are up, otherwise at once.
            drafter_path: folder of the EAGLE head that they start with, where `rollout.speculation.drafters` names
                eagle; None: `drafter.path`.

        Raises:
            ConfigError: an option of `rollout.vllm` is wrong.
            RuntimeError: an engine does not start.
        """
        rollout = config.rollout
        self._arguments = [
            (
                engine_arguments(config, environment, model_path, drafter_path, index),
                rollout.sampler == "coupled",
                rollout.sampling,
                precision,
                environment.end_ids,
            )
            for index, precision in enumerate(rollout.precisions)
        ]
        self._environment = environment
        self._head_folder: Path | None = None
        if config.rollout.speculation.uses_head:
            self._head_folder = Path(self._arguments[0][0]["speculative_config"]["model"])
        self._head: tuple[Any, int] | None = None  # the newest one pushed: Ray's reference to the weights, version
        self.workers_per_engine = config.rollout.tp_size
        self._max_restarts = config.rollout.max_restarts
        self._on_restart = on_restart
        self._policy_version = 0
        self._tail_fraction = rollout.precision_tail
        self._sleep_level, self._asleep = rollout.sleep, False
        self._owns_ray = not ray.is_initialized()
        if self._owns_ray:
            start_ray(largest_head(self._head_folder) if self._head_folder is not None else 0)
        self._engines = [
            EngineState(index, self._create_actor(index), max_requests=0, precision=precision)
            for index, precision in enumerate(rollout.precisions)
        ]
        self._dispatcher = Dispatcher(self._engines, self.restart)
        self._starts = [engine.actor.start.remote() for engine in self._engines]
        if wait:
            self.wait_until_up()

    def _create_actor(self, index: int) -> Any:
        return create_engine(self._environment, self._arguments[index], index, self.workers_per_engine)

    def wait_until_up(self) -> None:
        """Wait for engines that were started without `wait`.

        Raises:
            ConfigError: an option of `rollout.vllm` is wrong.
            RuntimeError: an engine does not start.
        """
        for engine, start in zip(self._engines, self._starts, strict=True):
            engine.max_requests = wait_until_up(engine.index, start)

    def generate(self, requests: list[RolloutRequest], more: MoreRequests = no_more_requests) -> Generator[Rollout]:
        """Generate all responses, yielding each as it finishes.

        Requests of one prompt go to one engine, so that it computes the prompt once. Rollouts do not depend on the
        number of engines or on the order; in a mixed fleet, the list of requests decides in which precision a prompt is
        generated.

        Args:
            requests: their keys (prompt id, sample index, epoch) are unique.
            more: see `MoreRequests`; not called with `rollout.precision_tail`, for which the number of responses must
                be known from the start.

        Raises:
            RuntimeError: an engine died more often than `rollout.max_restarts`, or the engines sleep.
            ValueError: two requests have the same key.
        """
        if len({key_of(request) for request in requests}) < len(requests):
            raise ValueError("two requests have the same prompt id, sample index and epoch")
        if self._asleep:
            raise RuntimeError("the engines sleep; wake them up, and give them weights, before they generate.")
        if not self._tail_fraction:
            return self._dispatcher.run(deal(requests, [engine.precision for engine in self._engines]), more)
        backlog = deal(requests, [engine.precision for engine in self._engines if engine.precision != "none"])
        size = int(self._tail_fraction * len(requests))
        if not size:
            return self._dispatcher.run(backlog)
        return self._dispatcher.run_with_tail(backlog, requests, size)

    def restart(self, index: int) -> None:
        """Replace a dead engine.

        Raises:
            RuntimeError: it died more often than `rollout.max_restarts`.
        """
        engine = self._engines[index]
        engine.restarts += 1
        if engine.restarts > self._max_restarts:
            raise RuntimeError(
                f"Rollout engine {index} died {engine.restarts} times, more than rollout.max_restarts="
                f"{self._max_restarts} allows; look for the cause (memory?) in Ray's logs of its process."
            )
        logger.warning("Rollout engine %d died; restarting it (%d/%d).", index, engine.restarts, self._max_restarts)
        engine.actor = self._create_actor(index)
        wait_until_up(index, engine.actor.start.remote())
        ray.get(engine.actor.set_policy_version.remote(self._policy_version))
        if self._head is not None:
            ray.get(engine.actor.update_drafter.remote(*self._head))
        self._on_restart(index)

    def update_drafter(self, tensors: Mapping[str, Tensor], version: int) -> None:
        """Give all engines, and those that are restarted later, new weights for the EAGLE head; at any time.

        The weights go through Ray's object store, once to every node that has engines. What the head shares with the
        policy is not among them and stays as it is.

        Args:
            tensors: the head's checkpoint, by its names (CPU, any floating dtype; `d2t` too where it has one).
            version: reported with `SpeculationCounts`.

        Raises:
            RuntimeError: the engines have no EAGLE head.
            ValueError: these are not the tensors of the head that the engines started with.
        """
        if self._head_folder is None:
            raise RuntimeError("rollout.speculation.drafters does not name eagle: the engines have no head to update.")
        check_head(tensors, self._head_folder)
        self._head = ray.put(pack_head(tensors, getattr(torch, self._environment.dtype))), version
        self._on_all_engines("update_drafter", *self._head)

    @property
    def engines(self) -> int:
        """Number of engines."""
        return len(self._engines)

    def call(self, index: int, method: str, *arguments: Any) -> Any:
        """Start a method of an engine; returns Ray's reference to the result."""
        return getattr(self._engines[index].actor, method).remote(*arguments)

    def sleep(self) -> None:
        """Let the engines leave their devices' memory to the trainer, as far as `rollout.sleep` says."""
        self._on_all_engines("sleep", self._sleep_level)
        self._asleep = True

    def wake_up(self) -> None:
        """Allocate the weights' memory again, for a weight update; nothing where the engines do not sleep."""
        if self._asleep:
            self._on_all_engines("wake_up", "weights")

    def wake_up_fully(self) -> None:
        """After the update, allocate the memory of keys and values too: the engines can generate."""
        if self._asleep:
            self._on_all_engines("wake_up", "kv_cache")
            self._asleep = False

    def _on_all_engines(self, method: str, *arguments: Any) -> None:
        calls = [self.call(index, method, *arguments) for index in range(self.engines)]
        for index, call in enumerate(calls):
            try:
                ray.get(call)
            except RayActorError:
                self.restart(index)  # it is awake, and has the weights

    def _query_all_engines(self, method: str) -> list[Any]:
        """Results of a method; None for an engine that has died, which the next generation or sync restarts."""
        calls = [self.call(index, method) for index in range(self.engines)]
        results: list[Any] = [None] * len(calls)
        for index, call in enumerate(calls):
            with suppress(RayActorError):
                results[index] = ray.get(call)
        return results

    def checksums(self) -> list[dict[str, int]]:
        """Per engine, the checksum of each Hugging Face tensor it holds; see `rollout.weight_transfer.checksum`."""
        sums: list[dict[str, int]] = ray.get([engine.actor.checksums.remote() for engine in self._engines])
        return sums

    def weight_rounding(self) -> list[dict[str, "Rounding"]]:
        """What int8 did to the weights of each layer, per worker of all engines; nothing of an engine that has died."""
        return [part for parts in self._query_all_engines("weight_rounding") if parts is not None for part in parts]

    def take_speculation_counts(self) -> list[SpeculationCounts]:
        """What drafting did since the last call, per engine; nothing of an engine that has died or does not draft."""
        return [counts for counts in self._query_all_engines("take_speculation_counts") if counts is not None]

    def take_precision_counts(self) -> PrecisionCounts:
        """What engines of each precision did since the last call."""
        counts, self._dispatcher.counts = self._dispatcher.counts, PrecisionCounts()
        return counts

    def speculation_states(self) -> list[dict[str, Any] | None]:
        """Per engine, what adaptive speculation has learned, as plain values (JSON) for a checkpoint.

        None for an engine that has died or does not draft.
        """
        states: list[LearnedSpeculation | None] = self._query_all_engines("speculation_state")
        return [None if state is None else state.to_dict() for state in states]

    def restore_speculation(self, states: list[dict[str, Any] | None]) -> None:
        """Continue from what `speculation_states` returned, of a fleet of any size."""
        if known := [LearnedSpeculation.from_dict(state) for state in states if state is not None]:
            for index, engine in enumerate(self._engines):
                ray.get(engine.actor.restore_speculation.remote(known[index % len(known)]))

    def set_policy_version(self, version: int) -> None:
        """The number that rollouts generated from now on carry."""
        self._policy_version = version
        ray.get([engine.actor.set_policy_version.remote(version) for engine in self._engines])

    def pids(self) -> list[int]:
        """Process ids of the engines."""
        pids: list[int] = ray.get([engine.actor.pid.remote() for engine in self._engines])
        return pids

    def shutdown(self) -> None:
        """Stop the engines, and Ray when this fleet started it."""
        stopping = [engine.actor.stop.remote() for engine in self._engines]
        if stopping:
            ray.wait(stopping, num_returns=len(stopping), timeout=_STOP_SECONDS)
        for engine in self._engines:
            ray.kill(engine.actor)
        self._engines.clear()
        self._head = None
        if self._owns_ray:
            ray.shutdown()
