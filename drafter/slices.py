"""Slices: work cut so small that it can be done while a device waits for something else.

A slice is, for example, the forward and backward pass of one packed row of drafter training. Whoever waits hands a
`SliceRunner` a way to ask whether the wait is over, and slices run in between, each only where it is expected to fit.
"""

import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch

Clock = Callable[[], float]
"""Seconds, from any origin, never backwards."""
Pending = Callable[[float], bool]
"""(seconds) -> whether the wait still lasts, after waiting for its end for at most that many seconds (0: just look)."""


class Slice(Protocol):
    """A piece of work of about a millisecond.

    It runs on the thread of the training step between two of its computations, so it must leave no trace there: no
    collective operations, no draws from the global random generators, no change of global modes.
    """

    kind: str
    """Slices of one kind take about equally long, e.g. `forward_backward`."""

    def run(self) -> None:
        """Do the work; an exception fails the training step that was waiting."""


class SliceSource(Protocol):
    """Where slices come from."""

    def next(self) -> Slice | None:
        """The next slice to run, or None when there is nothing to do now. Called again only after that slice ran."""


def run_directly(piece: Slice) -> None:
    """Run a slice here, with gradients, which the waiting pass may have switched off (that of the log-probs does)."""
    with torch.enable_grad():
        piece.run()


class Durations:
    """How long slices take: per kind, the median of the last runs, without the very first (it warms caches up)."""

    def __init__(self, window: int = 15) -> None:
        self._window = window
        self._seconds: dict[str, deque[float]] = {}

    def observe(self, kind: str, seconds: float) -> None:
        """Note the duration of one slice in seconds."""
        if kind in self._seconds:
            self._seconds[kind].append(seconds)
        else:
            self._seconds[kind] = deque(maxlen=self._window)

    def expected(self, kind: str) -> float:
        """Seconds that a slice of this kind will take; 0 as long as nothing is known, so that it is tried."""
        seen = self._seconds.get(kind)
        return statistics.median(seen) if seen else 0.0


@dataclass
class Filled:
    """What ran during one wait."""

    spans: list[tuple[float, float]] = field(default_factory=list)
    """(start, end) of every slice, by the runner's clock."""

    def seconds(self, start: float, end: float) -> float:
        """Seconds of slices between two times."""
        return sum(max(min(last, end) - max(first, start), 0.0) for first, last in self.spans)


def idle_until_fit(expected: float, elapsed: float, duration: float, share: float) -> float:
    """Seconds to go on waiting before a slice fits; 0 when it fits now, infinity when it will not.

    Within its expected length, a wait has room for what ends before `share` of that length is over. A wait that has
    outlasted its expected length is expected to last as long again as it is late already: the longer, the more room.

    Args:
        expected: seconds that the wait should last in all; 0 when nothing is known.
        elapsed: seconds it has lasted.
        duration: seconds that the slice will take.
        share: 0 .. 1 of the time is used; 0 runs nothing.
    """
    if share <= 0:
        return float("inf")
    if elapsed + duration <= share * expected:
        return 0.0
    return max(expected + duration / share - elapsed, 0.0)


class SliceRunner:
    """Runs the slices of a source while something else is pending."""

    def __init__(
        self, source: SliceSource, execute: Callable[[Slice], None] = run_directly, clock: Clock = time.perf_counter
    ) -> None:
        """`execute` runs one slice to its end (on a stream of its own, for example)."""
        self.source, self.execute, self.clock = source, execute, clock
        self.durations = Durations()
        self.share = 1.0
        """Share of the expected waits that may be filled, set by the guard; 0 .. 1."""
        self._next: Slice | None = None

    def run_while(self, pending: Pending, expected: float) -> Filled:
        """Fill one wait, and return when it is over (at the latest one slice later).

        Args:
            pending: tells whether the wait still lasts.
            expected: seconds that it should last from now on; 0 when nothing is known.
        """
        filled, start = Filled(), self.clock()
        while pending(0):
            piece = self._peek()
            if piece is None:
                idle = float("inf")
            else:
                duration = self.durations.expected(piece.kind)
                idle = idle_until_fit(expected, self.clock() - start, duration, self.share)
            if idle > 0:
                if not pending(idle):
                    break
            elif piece is not None:
                filled.spans.append(self._run(piece))
        return filled

    def run_until(self, wanted: Callable[[], bool], deadline: float = float("inf")) -> Filled:
        """Fill an idle tail: run slices until `wanted`, the end of work or the deadline; back within one slice.

        Args:
            wanted: whether the batch is complete or the device needed, e.g. `event.is_set`; asked between slices.
            deadline: time of the runner's clock that slices must not be expected to pass.
        """
        filled = Filled()
        while not wanted() and (piece := self._peek()) is not None:
            if self.clock() + self.durations.expected(piece.kind) > deadline:
                break
            filled.spans.append(self._run(piece))
        return filled

    def _peek(self) -> Slice | None:
        if self._next is None:
            self._next = self.source.next()
        return self._next

    def _run(self, piece: Slice) -> tuple[float, float]:
        self._next = None
        start = self.clock()
        self.execute(piece)
        end = self.clock()
        self.durations.observe(piece.kind, end - start)
        return start, end
