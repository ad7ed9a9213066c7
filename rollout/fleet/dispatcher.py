"""Keeps the engines of a fleet busy from one backlog of requests, and collects what they finish."""

import itertools
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayActorError

from rollout.fleet.mixed_precision import LongestResponses, PrecisionCounts
from rollout.fleet.requests import Backlog, RequestKey, continue_from, deal, join_rollouts, key_of
from rollout.types import Rollout, RolloutRequest

# Long enough that the calls cost nothing beside the generation, short enough for completions to stream.
POLL_SECONDS = 0.25

MoreRequests = Callable[[bool], list[list[RolloutRequest]] | None]
"""Called repeatedly during a generation, with whether the fleet is idle: returns further requests, a list per prompt.

A generation is over when the fleet is idle and nothing is returned. None ends it at once: responses that have tokens
are returned as they are, with finish reason "unfinished", and pending requests are dropped."""


def no_more_requests(idle: bool) -> list[list[RolloutRequest]]:
    """The `MoreRequests` of a generation whose requests are all known from the start."""
    return []


@dataclass
class EngineState:
    """One engine and what it is working on."""

    index: int
    actor: Any
    """Ray's handle of a `RolloutEngine`."""
    max_requests: int
    """That it can run at the same time."""
    precision: str
    """By the names of `rollout.quantization`."""
    running: dict[RequestKey, RolloutRequest] = field(default_factory=dict)
    submitted: list[Any] = field(default_factory=list)
    """Ray's references to submissions that have not been checked for errors."""
    restarts: int = 0
    busy_since: float = 0.0
    """In seconds, by `time.perf_counter`."""


class Dispatcher:
    """Hands requests to engines and collects rollouts; an engine that dies is restarted and gets its requests again."""

    def __init__(self, engines: Sequence[EngineState], restart: Callable[[int], None]) -> None:
        """
        Args:
            engines: of the fleet.
            restart: engine index -> replace a dead engine; raises RuntimeError when it has died too often.
        """
        self._engines, self._restart = engines, restart
        self.counts = PrecisionCounts()
        """What engines of each precision did; whoever reads it puts a new one in its place."""

    def run(self, backlog: Backlog, more: MoreRequests = no_more_requests) -> Generator[Rollout]:
        """Generate everything in the backlog, and what `more` returns, yielding responses as they finish."""
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

    def run_with_tail(self, backlog: Backlog, requests: list[RolloutRequest], size: int) -> Generator[Rollout]:
        """Generate with quantized engines; the engines without quantization finish the longest responses.

        Args:
            backlog: the requests, dealt to the quantized precisions.
            requests: the same as a list.
            size: most responses that are finished without quantization.
        """
        requested = {key_of(request): request for request in requests}
        longest = LongestResponses(len(requests), size)
        limit: int | None = None
        try:
            with closing(self.run(backlog)) as rollouts:
                for rollout in rollouts:
                    full = requested[key_of(rollout)].max_tokens
                    truncated = rollout.finish_reason == "length" and len(rollout.token_ids) < full
                    yield from longest.add(rollout, truncated)
                    if longest.limit != limit:
                        limit = longest.limit
                        self._shorten(limit)
        finally:
            self._shorten(None)
        complete, unfinished = longest.split()
        self.counts.discarded += longest.discarded
        yield from complete
        partial = {key_of(rollout): rollout for rollout in unfinished}
        rest = [continue_from(requested[key], rollout) for key, rollout in partial.items()]
        with closing(self.run(deal(rest, ["none"]))) as rollouts:
            for rollout in rollouts:
                yield join_rollouts(partial[key_of(rollout)], rollout)

    def _shorten(self, limit: int | None) -> None:
        for engine in self._engines:
            if engine.precision != "none":
                engine.actor.shorten.remote(limit)

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
            self._restart(engine.index)
            engine.submitted = [engine.actor.submit.remote(list(engine.running.values()))]
            return []
        engine.submitted.clear()
        for rollout in finished:
            del engine.running[key_of(rollout)]
        if finished and not engine.running:
            self.counts.add(engine.precision, time.perf_counter() - engine.busy_since)
        return finished

    def _stop(self, polls: dict[Any, EngineState]) -> list[Rollout]:
        """Responses that finished since the last poll, and unfinished ones; the engines are left idle."""
        stopped = [rollout for poll, engine in polls.items() for rollout in self._collect(engine, poll)]
        polls.clear()
        for engine in self._engines:
            if engine.running:
                stopped += self._collect(engine, engine.actor.take_unfinished.remote())
        return stopped

    def _abandon(self, polls: list[Any]) -> None:
        """Leave the engines idle, also when the caller stopped early or an error is being raised."""
        for engine in self._engines:
            if engine.running:
                engine.running.clear()
                engine.submitted.clear()
                polls.append(engine.actor.take_unfinished.remote())
        if polls:
            ray.wait(polls, num_returns=len(polls))
