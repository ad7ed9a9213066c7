"""Limits what filling costs: compares filled training steps with unfilled ones and sets how much may be filled."""

import statistics
from collections import deque
from typing import Any


class FillGuard:
    """Leaves every n-th step unfilled, and lowers `share` when the filled ones are slower by more than `bound`.

    The filled steps between two unfilled ones, a cycle, are compared with the mean of those two, so that a drift of the
    step time cancels; the median over cycles ignores single slow steps. A new share is evaluated with new cycles only.

    Every rank has a guard of its own, fed with its own step times: ranks must leave the same steps unfilled, which the
    count of steps ensures, but need not agree on the share.
    """

    def __init__(self, bound: float = 0.03, every: int = 5, cycles: int = 3) -> None:
        """
        Args:
            bound: largest accepted (filled - unfilled) / unfilled of the step time.
            every: each step whose number is a multiple of it stays unfilled; at least 2.
            cycles: how many cycles it takes to evaluate a share.

        Raises:
            ValueError: for `every` below 2.
        """
        if every < 2:
            raise ValueError(f"every={every} would leave no step to fill; use 2 or more.")
        self.bound, self.every = bound, every
        self.share = 1.0
        """Fraction of the bubbles that may be filled, 0 .. 1: for `SliceRunner.share`."""
        self._step = 0
        self._unfilled: float | None = None
        self._filled: list[float] = []
        self._costs: deque[float] = deque(maxlen=cycles)

    def fill_next(self) -> bool:
        """Whether the next step is to be filled."""
        return self._step % self.every != 0

    @property
    def cost(self) -> float | None:
        """Relative cost of filling at the current share, e.g. 0.02; None until enough cycles were measured."""
        return statistics.median(self._costs) if len(self._costs) == self._costs.maxlen else None

    def observe(self, seconds: float, work: float = 1.0) -> None:
        """Record the step that `fill_next` decided about, and adjust the share at the end of a cycle.

        Args:
            seconds: its duration.
            work: its amount of work, e.g. its tokens, so that steps of unequal size can be compared.
        """
        pace, filled = seconds / work, self.fill_next()
        self._step += 1
        if filled:
            self._filled.append(pace)
            return
        if self._unfilled is not None and self._filled:
            self._costs.append(statistics.median(self._filled) / ((self._unfilled + pace) / 2) - 1)
        self._unfilled, self._filled = pace, []
        if self.cost is not None:
            self._adjust(self.cost)

    def _adjust(self, cost: float) -> None:
        if cost > self.bound:
            share = self.share * 0.7 if self.share > 0.05 else 0.0
        elif cost < self.bound / 2:
            share = min(self.share + 0.05, 1.0)
        else:
            return
        if share != self.share:
            self.share = share
            self._costs.clear()

    def state(self) -> dict[str, Any]:
        """State for a checkpoint: plain numbers and lists."""
        return {
            "share": self.share,
            "step": self._step,
            "unfilled": self._unfilled,
            "filled": list(self._filled),
            "costs": list(self._costs),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from `state()` of an earlier guard."""
        self.share, self._step, self._unfilled = state["share"], state["step"], state["unfilled"]
        self._filled = list(state["filled"])
        self._costs.clear()
        self._costs.extend(state["costs"])
