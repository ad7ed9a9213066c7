"""Seconds of an engine step as a function of live requests and draft tokens, learned while it runs."""

import math
import random
from collections import deque
from operator import mul
from statistics import median
from typing import Any

import numpy as np

_WINDOW = 24
"""Steps per cell: a sliding window follows longer contexts and other load on the same cores."""
_FIT_EVERY = 64
"""Observations between fits."""
_SURE = 6
"""Observations after which a cell is trusted as much as possible."""
_DOUBT = 0.05
"""Relative uncertainty of the fit where a cell was not measured."""
_NOISE = 0.05
"""Relative spread of single steps."""
_STALE = 400
"""Steps after which a cell that was not visited counts for half."""
_PRIOR_STEPS = 0.1
"""Weight of the assumption about drafts that were not measured, in steps."""
_REDRAW = 8
"""Steps for which a draw of the uncertainties is kept."""

Cell = tuple[str, int, int]
"""Drafter, bucket of the batch size, bucket of the draft tokens."""
Measured = tuple[float, float, float]
"""Batch, draft tokens, seconds."""


class LatencyModel:
    """A linear fit, corrected by the medians of nearby measurements.

    A cell is a drafter and a narrow range of batch sizes and draft tokens. Medians make a garbage-collection pause
    harmless. The fit is `a + b * batch + c * drafted + d * (batch if drafted) + e * drafted / batch`, everything at
    least 0, by least squares on the medians. (With drafts every request takes an attention and bookkeeping path that
    costs more. A drafter that makes one token after the other, `serial`, takes time for each, at any batch size.)
    """

    def __init__(self, serial: bool = False) -> None:
        """
        Args:
            serial: the drafter makes one token after the other.
        """
        self._serial = serial
        self._cells: dict[Cell, deque[Measured]] = {}
        self._medians: dict[Cell, Measured] = {}
        self._seen: dict[Cell, int] = {}  # when a cell was last visited, in observations
        self._observations = 0
        self._draws: dict[str, float] = {}  # by drafter
        self._fit: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0, 0.0)
        self._until_fit = 1

    def observe(self, drafter: str, batch: int, drafted: float, seconds: float) -> None:
        """Record one step.

        Args:
            drafter: whose drafts were verified.
            batch: requests that decoded.
            drafted: draft tokens over all requests.
            seconds: duration of the step.
        """
        cell = drafter, _bucket(batch), _bucket(drafted)
        steps = self._cells.setdefault(cell, deque(maxlen=_WINDOW))
        steps.append((batch, drafted, seconds))
        self._medians.pop(cell, None)  # computed again when needed
        self._observations += 1
        self._seen[cell] = self._observations
        if self._observations % _REDRAW == 0:
            self._draws.clear()
        self._until_fit -= 1
        if self._until_fit <= 0:
            self._refit()

    def _refit(self) -> None:
        self._until_fit = min(_FIT_EVERY, 1 + sum(map(len, self._cells.values())) // 4)
        # The median of one or two steps may be a warm-up or a pause.
        trusted = [cell for cell, steps in self._cells.items() if len(steps) >= 3] or list(self._cells)
        middle = np.array([self._median(cell) for cell in trusted])
        sizes = np.array([min(len(self._cells[cell]), _SURE) for cell in trusted])
        rows = np.array([self._features(batch, drafted) for batch, drafted, _ in middle])
        # Until drafts were measured, a draft row is assumed to cost half a request: no leap into long drafts.
        batch, _, seconds = middle[middle[:, 1].argmin()]
        rows = np.vstack([rows, self._features(batch, batch)])
        times, sizes = np.append(middle[:, 2], 1.5 * seconds), np.append(sizes, _PRIOR_STEPS)
        # The fit minimises relative errors, and gives cells with few observations little weight.
        self._fit = tuple(_nonnegative_least_squares(rows, times, np.sqrt(sizes) / times).tolist())

    def predict(self, drafter: str, batch: int, drafted: float) -> tuple[float, float]:
        """Expected seconds of a step, and the relative standard error of the expectation."""
        if not self._cells:
            return 1e-3 * (1.0 + drafted / batch), _DOUBT
        fitted = self._fitted(batch, drafted)
        cell = drafter, _bucket(batch), _bucket(drafted)
        if cell not in self._cells:
            return fitted, _DOUBT
        near_batch, near_drafted, seconds = self._median(cell)
        count = len(self._cells[cell]) * 0.5 ** ((self._observations - self._seen[cell]) / _STALE)
        share = min(count / _SURE, 1.0)
        correction = seconds / self._fitted(near_batch, near_drafted)
        return fitted * (share * correction + 1 - share), max(_NOISE / max(count, 1.0) ** 0.5, _DOUBT * (1 - share))

    def _median(self, cell: Cell) -> Measured:
        if cell not in self._medians:
            batch, drafted, seconds = zip(*self._cells[cell], strict=True)
            self._medians[cell] = median(batch), median(drafted), median(seconds)
        return self._medians[cell]

    def _fitted(self, batch: float, drafted: float) -> float:
        return max(sum(map(mul, self._fit, self._features(batch, drafted))), 1e-5)

    def _features(self, batch: float, drafted: float) -> tuple[float, ...]:
        return 1.0, batch, drafted, batch if drafted else 0.0, drafted / batch if self._serial else 0.0

    def draw(self, drafter: str, batch: int, drafted: float, generator: random.Random) -> float:
        """A draw from the prediction's uncertainty, in seconds; kept for some steps, so that choices are steady.

        All draft lengths of a drafter share a draw: the steps that use it differ in their number of draft tokens
        anyway, so their cost is learned without exploring lengths that are predicted to be worse.
        """
        seconds, error = self.predict(drafter, batch, drafted)
        if drafter not in self._draws:
            self._draws[drafter] = generator.gauss(0.0, 1.0)
        return seconds * max(1.0 + error * self._draws[drafter], 0.1)

    def seconds_per_row(self) -> float:
        """Seconds that one more draft token takes, by the fit."""
        return self._fit[2]

    def state(self) -> list[Any]:
        """All measurements, as plain values."""
        return [[*cell, [list(step) for step in steps]] for cell, steps in self._cells.items()]

    def restore(self, state: list[Any]) -> None:
        """Continue from what `state` returned."""
        for drafter, batch, drafted, steps in state:
            cell = drafter, batch, drafted
            self._cells[cell] = deque(((b, d, s) for b, d, s in steps), maxlen=_WINDOW)
            self._seen[cell] = 0
        if self._cells:
            self._refit()


def _bucket(amount: float) -> int:
    """0, 1, 2, 3-4, 5-8, ... share a bucket."""
    return 0 if amount < 0.5 else 1 + (math.ceil(amount) - 1).bit_length()


def _nonnegative_least_squares(rows: np.ndarray, values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted least squares, dropping the most negative coefficient until none is negative."""
    active = list(range(rows.shape[1]))
    while True:
        solved, *_ = np.linalg.lstsq(rows[:, active] * weights[:, None], values * weights, rcond=None)
        if (solved >= 0).all() or len(active) == 1:
            break
        del active[int(solved.argmin())]
    coefficients = np.zeros(rows.shape[1])
    coefficients[active] = np.maximum(solved, 0.0)
    return coefficients
