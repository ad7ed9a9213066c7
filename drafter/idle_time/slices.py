"""Slices: pieces of work so small that they can be done while a device waits for something else.

A slice is, for example, the forward and backward pass of one packed row of drafter training. The code that waits passes
a `SliceRunner` a function that says whether the wait is over, and slices run until then, each only if it is expected to
fit.
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

Fits = Callable[[int], bool]
"""(size) -> whether a slice of that size should end in time."""


class Slice(Protocol):
    """A piece of work of about a millisecond.

    It runs on the thread of the training step between two of its computations, so it must have no side effects there:
    no collective operations, no draws from the global random generators, no change of global modes.
    """

    size: int
    """Amount of work, e.g. in tokens: a slice of twice the size takes about twice as long."""

    def run(self) -> None:
        """Do the work; an exception fails the training step that was waiting."""


class SliceSource(Protocol):
    """A supply of slices."""

    def next(self, fits: Fits) -> Slice | None:
        """The next slice to run, or None when there is nothing to do now.

        A source that can divide its work returns the largest slice that fits, or else the smallest. Until a slice has
        run it may be returned again, in another size.

        Args:
            fits: whether a slice of a size should end in time.
        """


def run_directly(piece: Slice) -> None:
    """Run a slice here, with gradients, which the waiting pass may have switched off (that of the log-probs does)."""
    with torch.enable_grad():
        piece.run()


class Durations:
    """How long slices take: the median seconds per size of the last runs of about that size.

    The very first run does not count (it warms caches up). For a size that was not measured the rate of the nearest one
    is used: too little for small slices, which have a fixed cost, until the first of them has run.
    """

    def __init__(self, window: int = 15) -> None:
        self._window = window
        self._rates: dict[int, deque[float]] = {}  # by power of two of the size
        self._warm = False

    def observe(self, size: int, seconds: float) -> None:
        """Record the duration of one slice in seconds."""
        if self._warm:
            self._rates.setdefault(size.bit_length(), deque(maxlen=self._window)).append(seconds / size)
        self._warm = True

    def expected(self, size: int) -> float:
        """Seconds that a slice of this size will take; 0 as long as nothing is known, so that it is tried."""
        if not self._rates:
            return 0.0
        nearest = min(self._rates, key=lambda power: abs(power - size.bit_length()))
        return size * statistics.median(self._rates[nearest])


@dataclass
class Filled:
    """What ran during one wait."""

    spans: list[tuple[float, float]] = field(default_factory=list)
    """(start, end) of every slice, by the runner's clock."""

    def seconds(self, start: float, end: float) -> float:
        """Seconds of slices between two times."""
        return sum(max(min(last, end) - max(first, start), 0.0) for first, last in self.spans)


def room(expected: float, elapsed: float, share: float) -> float:
    """Seconds that a slice may take if it begins now.

    Within its expected length, a wait has room for slices that end before `share` of that length is over. A wait that
    is longer than expected is predicted to last as long again as it is late already: the longer, the more room.

    Args:
        expected: seconds that the whole wait should last; 0 when nothing is known.
        elapsed: seconds it has lasted.
        share: 0 .. 1 of the time is used; 0 runs nothing.
    """
    return max(share * expected - elapsed, share * (elapsed - expected))


def idle_until_fit(expected: float, elapsed: float, duration: float, share: float) -> float:
    """Seconds to wait until there is `room`; 0 when there is now, infinity when there will not be.

    Args:
        expected: see `room`.
        elapsed: see `room`.
        duration: seconds that the slice will take.
        share: see `room`.
    """
    if share <= 0:
        return float("inf")
    if duration <= room(expected, elapsed, share):
        return 0.0
    return max(expected + duration / share - elapsed, 0.0)


class SliceRunner:
    """Runs the slices of a source while something else is pending."""

    def __init__(
        self, source: SliceSource, execute: Callable[[Slice], None] = run_directly, clock: Clock = time.perf_counter
    ) -> None:
        """
        Args:
            source: of slices.
            execute: runs one slice to its end (on a stream of its own, for example).
            clock: in seconds.
        """
        self.source, self.execute, self.clock = source, execute, clock
        self.durations = Durations()
        self.share = 1.0
        """Fraction of the expected waits that may be filled, set by the guard; 0 .. 1."""

    def run_while(self, pending: Pending, expected: float) -> Filled:
        """Fill one wait, and return when it is over (at the latest one slice later).

        Args:
            pending: whether the wait still lasts.
            expected: seconds that it should last from now on; 0 when nothing is known.
        """
        filled, start = Filled(), self.clock()
        while pending(0):
            elapsed = self.clock() - start
            piece = self._next(room(expected, elapsed, self.share))
            if piece is None:
                idle = float("inf")
            else:
                idle = idle_until_fit(expected, elapsed, self.durations.expected(piece.size), self.share)
            if idle > 0:
                if not pending(idle):
                    break
            elif piece is not None:
                filled.spans.append(self._run(piece))
        return filled

    def run_until(self, wanted: Callable[[], bool], deadline: float = float("inf")) -> Filled:
        """Fill an idle tail: run slices until `wanted`, the end of work or the deadline; back within one slice.

        Args:
            wanted: whether the batch is complete or the device needed, e.g. `event.is_set`; called between slices.
            deadline: time of the runner's clock by which slices are expected to end.
        """
        filled = Filled()
        while not wanted() and (piece := self._next(deadline - self.clock())) is not None:
            if self.clock() + self.durations.expected(piece.size) > deadline:
                break
            filled.spans.append(self._run(piece))
        return filled

    def _next(self, seconds: float) -> Slice | None:
        return self.source.next(lambda size: self.durations.expected(size) <= seconds)

    def _run(self, piece: Slice) -> tuple[float, float]:
        start = self.clock()
        self.execute(piece)
        end = self.clock()
        self.durations.observe(piece.size, end - start)
        return start, end
