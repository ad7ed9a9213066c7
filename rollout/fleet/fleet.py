"""The fleet: rollout engines as Ray actors, kept busy from one backlog, restarted when they die.

fleet = RolloutFleet(config, environment, model_path, on_restart)
for rollout in fleet.generate(requests): ...
fleet.shutdown()
"""

import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import torch
from ray.exceptions import RayActorError
from torch import Tensor

from megatron_rl.config import Config
from rollout.engine.engine import EngineEnvironment, engine_arguments
from rollout.fleet.engine_actor import create_engine, wait_until_up
from rollout.fleet.local_ray import start_ray
from rollout.fleet.mixed_precision import PrecisionCounts, Tail
from rollout.fleet.requests import Backlog, RequestKey, deal, go_on, join, key_of
from rollout.speculation.head_weights import check_head, largest_head, pack_head
from rollout.types import Rollout, RolloutRequest, SpeculationCounts

if TYPE_CHECKING:
    from rollout.quantization.int8 import Rounding

logger = logging.getLogger(__name__)

# Long enough that the calls cost nothing beside the generation, short enough for completions to stream.
POLL_SECONDS = 0.25

_STOP_SECONDS = 10.0

More = Callable[[bool], list[list[RolloutRequest]] | None]
"""Asked again and again during a generation, with whether nothing is left to do: the requests of a further prompt, of
the next one, ... A generation is over when nothing is left and nothing comes. None ends it now: what has begun comes as
far as it is, with finish reason "unfinished", and what has not does not come."""


@dataclass
class EngineState:
    """One engine and what it is working on."""

    index: int
    actor: Any
    max_requests: int
    precision: str  # by the names of `rollout.quantization`
    running: dict[RequestKey, RolloutRequest] = field(default_factory=dict)
    submitted: list[Any] = field(default_factory=list)  # submissions whose success has not been looked at
    restarts: int = 0
    busy_since: float = 0.0


class RolloutFleet:
    """`rollout.engines` engines holding the model at `model_path`.

    `on_restart(index)` is called when an engine has died and is up again with the weights of `model_path`, before it
    generates: the place to give it the current weights, through a `FleetClient` of that engine.
    """

    def __init__(
        self,
        config: Config,
        environment: EngineEnvironment,
        model_path: str,
        on_restart: Callable[[int], None],
        wait: bool = True,
        drafter_path: str | None = None,
    ) -> None:
        """Start Ray if there is none, and the engines; returns when all are up, or at once without `wait`.

        `drafter_path` is the folder of the EAGLE head that they start with, where `rollout.speculation.drafters` names
        eagle; None: `drafter.path`.

        To be called from a thread that lives as long as the fleet: the kernel ends Ray's processes with the thread that
        started them. Raises ConfigError for wrong `rollout.vllm` options, RuntimeError when an engine does not start.
        """
        rollout = config.rollout
        self._arguments = [
            (
                engine_arguments(config, environment, model_path, drafter_path, index),
                rollout.sampler == "coupled",
                rollout.sampling,
                precision,
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
        self._counts = PrecisionCounts()
        self._sleep_level, self._asleep = rollout.sleep, False
        self._owns_ray = not ray.is_initialized()
        if self._owns_ray:
            start_ray(largest_head(self._head_folder) if self._head_folder is not None else 0)
        self._engines = [
            EngineState(index, self._create_actor(index), max_requests=0, precision=precision)
            for index, precision in enumerate(rollout.precisions)
        ]
        self._starts = [engine.actor.start.remote() for engine in self._engines]
        if wait:
            self.wait_until_up()

    def _create_actor(self, index: int) -> Any:
        return create_engine(self._environment, self._arguments[index], index, self.workers_per_engine)

    def wait_until_up(self) -> None:
        """Wait for engines that were started without `wait`. Raises as the constructor does."""
        for engine, start in zip(self._engines, self._starts, strict=True):
            engine.max_requests = wait_until_up(engine.index, start)

    def generate(self, requests: list[RolloutRequest], more: More = lambda idle: []) -> Generator[Rollout]:
        """Generate all responses, yielding each as it finishes. Keys (prompt id, sample index, epoch) are unique.

        `more` is not asked with `rollout.precision_tail`, which has to know how many responses there will be.

        Requests of one prompt go to one engine, which so computes the prompt once. Rollouts do not depend on the
        number of engines or on the order; in a mixed fleet, the list of requests decides in which precision a prompt is
        generated. Raises RuntimeError when an engine died more often than `rollout.max_restarts`, or when the engines
        sleep.
        """
        if len({key_of(request) for request in requests}) < len(requests):
            raise ValueError("two requests have the same prompt id, sample index and epoch")
        if self._asleep:
            raise RuntimeError("the engines sleep; wake them up, and give them weights, before they generate.")
        if not self._tail_fraction:
            return self._run(deal(requests, [engine.precision for engine in self._engines]), more)
        quantized = [engine.precision for engine in self._engines if engine.precision != "none"]
        backlog = deal(requests, quantized)
        size = int(self._tail_fraction * len(requests))
        return self._run_with_tail(backlog, requests, Tail(len(requests), size)) if size else self._run(backlog)

    def _run_with_tail(self, backlog: Backlog, requests: list[RolloutRequest], tail: Tail) -> Generator[Rollout]:
        """Quantized engines generate; the engines without quantization finish the longest responses."""
        asked = {key_of(request): request for request in requests}
        limit: int | None = None
        try:
            with closing(self._run(backlog)) as rollouts:
                for rollout in rollouts:
                    full = asked[key_of(rollout)].max_tokens
                    cut = rollout.finish_reason == "length" and len(rollout.token_ids) < full
                    yield from tail.add(rollout, cut)
                    if tail.limit != limit:
                        limit = tail.limit
                        self._shorten(limit)
        finally:
            self._shorten(None)
        complete, begun = tail.split()
        self._counts.discarded += tail.discarded
        yield from complete
        beginnings = {key_of(rollout): rollout for rollout in begun}
        rest = [go_on(asked[key], rollout) for key, rollout in beginnings.items()]
        with closing(self._run(deal(rest, ["none"]))) as rollouts:
            for rollout in rollouts:
                yield join(beginnings[key_of(rollout)], rollout)

    def _shorten(self, limit: int | None) -> None:
        for engine in self._engines:
            if engine.precision != "none":
                engine.actor.shorten.remote(limit)

    def _run(self, backlog: Backlog, more: More = lambda idle: []) -> Generator[Rollout]:
        # By its number a further prompt has the precision that it would have, had it been there from the start.
        precisions = itertools.cycle([engine.precision for engine in self._engines])
        turn = itertools.islice(precisions, sum(map(len, backlog.values())), None)
        polls: dict[Any, EngineState] = {}
        try:
            while True:
                idle = not any(backlog.values()) and not any(engine.running for engine in self._engines)
                further = more(idle)
                if further is None:
                    yield from self._stop(polls)
                    break
                if idle and not further:
                    break
                for group in further:
                    backlog[next(turn)].append(group)
                for precision, groups in backlog.items():
                    self._feed(groups, [engine for engine in self._engines if engine.precision == precision])
                polling = {engine.index for engine in polls.values()}
                for engine in self._engines:
                    if engine.running and engine.index not in polling:
                        polls[engine.actor.poll.remote(POLL_SECONDS)] = engine
                ready, _ = ray.wait(list(polls), num_returns=1)
                yield from self._collect(polls.pop(ready[0]), ready[0])
        finally:
            self._abandon(list(polls))

    def _feed(self, backlog: deque[list[RolloutRequest]], engines: list[EngineState]) -> None:
        """Hand groups from the backlog to the engine with the fewest requests."""
        batches: dict[int, list[RolloutRequest]] = {}
        while backlog:
            engine = min(engines, key=lambda engine: len(engine.running))
            # A lone engine gets everything at once, in order, so that its batches are the same in every run.
            if len(engines) > 1 and len(engine.running) >= engine.max_requests:
                break
            if not engine.running:
                engine.busy_since = time.perf_counter()
            group = backlog.popleft()
            engine.running.update({key_of(request): request for request in group})
            batches.setdefault(engine.index, []).extend(group)
        for index, batch in batches.items():
            engine = self._engines[index]
            engine.submitted.append(engine.actor.submit.remote(batch))

    def _collect(self, engine: EngineState, poll: Any) -> list[Rollout]:
        try:
            finished: list[Rollout] = ray.get(poll)
            ray.get(engine.submitted)
        except RayActorError:
            self.restart(engine.index)
            engine.submitted = [engine.actor.submit.remote(list(engine.running.values()))]
            return []
        engine.submitted.clear()
        for rollout in finished:
            del engine.running[key_of(rollout)]
        if finished and not engine.running:
            self._counts.add(engine.precision, time.perf_counter() - engine.busy_since)
        return finished

    def _stop(self, polls: dict[Any, EngineState]) -> list[Rollout]:
        """What has finished since it was collected last, and what has begun; the engines are left idle."""
        stopped = [rollout for poll, engine in polls.items() for rollout in self._collect(engine, poll)]
        polls.clear()
        for engine in self._engines:
            if engine.running:
                stopped += self._collect(engine, engine.actor.take_unfinished.remote())
        return stopped

    def _abandon(self, polls: list[Any]) -> None:
        """Leave the engines idle, also when the caller stopped early or an error is on its way up."""
        for engine in self._engines:
            if engine.running:
                engine.running.clear()
                engine.submitted.clear()
                polls.append(engine.actor.take_unfinished.remote())
        if polls:
            ray.wait(polls, num_returns=len(polls))

    def restart(self, index: int) -> None:
        """Replace a dead engine. Raises RuntimeError past `rollout.max_restarts`."""
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
        """Give all engines new weights for the EAGLE head, and those that are restarted later; any time.

        `tensors` are those of the head's checkpoint, by their names there (CPU, any floating dtype; `d2t` too where it
        has one). What the head shares with the policy is not among them and stays as it is. `version` is reported with
        `SpeculationCounts`. The weights go through Ray's object store, once to every node that has engines.

        Raises ValueError when they are not the tensors of the head that the engines started with, RuntimeError without
        an EAGLE head.
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
        """The weights' memory comes back, for a weight update. Nothing where the engines do not sleep."""
        if self._asleep:
            self._on_all_engines("wake_up", "weights")

    def wake_up_fully(self) -> None:
        """After the update, the memory of keys and values comes back too, and the engines can generate."""
        if self._asleep:
            self._on_all_engines("wake_up", "kv_cache")
            self._asleep = False

    def _on_all_engines(self, method: str, *arguments: Any) -> None:
        calls = [getattr(engine.actor, method).remote(*arguments) for engine in self._engines]
        for index, call in enumerate(calls):
            try:
                ray.get(call)
            except RayActorError:
                self.restart(index)  # it is awake, and has the weights

    def checksums(self) -> list[dict[str, int]]:
        """Per engine, the checksum of each Hugging Face tensor it holds; see `rollout.weight_transfer.checksum`."""
        sums: list[dict[str, int]] = ray.get([engine.actor.checksums.remote() for engine in self._engines])
        return sums

    def weight_rounding(self) -> list[dict[str, "Rounding"]]:
        """What int8 did to the weights of each layer, per worker of all engines; nothing of an engine that has died."""
        calls = [engine.actor.weight_rounding.remote() for engine in self._engines]
        parts: list[dict[str, Rounding]] = []
        for call in calls:
            with suppress(RayActorError):  # the next generation or sync notices, and restarts it
                parts += ray.get(call)
        return parts

    def take_speculation_counts(self) -> list[SpeculationCounts]:
        """What drafting gave since the last call, per engine; nothing of an engine that has died or does not draft."""
        calls = [engine.actor.take_speculation_counts.remote() for engine in self._engines]
        counts: list[SpeculationCounts | None] = []
        for call in calls:
            with suppress(RayActorError):  # the next generation or sync notices, and restarts it
                counts.append(ray.get(call))
        return [count for count in counts if count is not None]

    def take_precision_counts(self) -> PrecisionCounts:
        """What engines of each precision did since the last call."""
        counts, self._counts = self._counts, PrecisionCounts()
        return counts

    def speculation_states(self) -> list[dict[str, Any] | None]:
        """Per engine, what adaptive speculation has learned (see `RolloutEngine`); None for one that died."""
        calls = [engine.actor.speculation_state.remote() for engine in self._engines]
        states: list[dict[str, Any] | None] = [None] * len(calls)
        for index, call in enumerate(calls):
            with suppress(RayActorError):
                states[index] = ray.get(call)
        return states

    def restore_speculation(self, states: list[dict[str, Any] | None]) -> None:
        """Take over what `speculation_states` returned, of a fleet of any size."""
        if known := [state for state in states if state is not None]:
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
        self._engines = []
        self._head = None
        if self._owns_ray:
            ray.shutdown()
