"""Fleets of several precisions: who generates which prompt, and who finishes the longest responses."""

import heapq
import math
from dataclasses import dataclass, field, replace

from rollout.types import Rollout


@dataclass
class PrecisionCounts:
    """What a mixed fleet did since the last reading."""

    seconds: dict[str, float] = field(default_factory=dict)
    """Precision -> seconds in which its engines had requests, summed over them."""
    discarded: int = 0
    """Tokens past the cut, which quantized engines sampled and another engine replaced."""

    def add(self, precision: str, seconds: float) -> None:
        """An engine has done all that it had."""
        self.seconds[precision] = self.seconds.get(precision, 0.0) + seconds


class Tail:
    """The longest responses of a generation, which the engines without quantization finish.

    All responses are sorted by the length that the quantized engines alone would give them. The longest one that is not
    among the last `size` sets the cut; what is longer is cut there. This depends on the responses only, not on when or
    where one of them was ready. A response that is shorter than `size` finished ones is surely no tail, so it is
    released at once.
    """

    def __init__(self, total: int, size: int) -> None:
        """`total` responses will come; `size`, positive and smaller, of them are finished elsewhere at most."""
        self._left, self._size = total, size
        self._longest: list[tuple[float, int, Rollout]] = []  # a heap; the number settles ties
        self._released = 0  # length of the longest response that was released
        self.discarded = 0
        """Tokens past the cut; known after `split`."""

    def add(self, rollout: Rollout, cut: bool) -> list[Rollout]:
        """Take a response, complete or `cut` at `limit` or later; returns the complete one that it proves no tail."""
        self._left -= 1
        heapq.heappush(self._longest, (math.inf if cut else len(rollout.token_ids), self._left, rollout))
        if len(self._longest) <= self._size:
            return []
        _, _, shortest = heapq.heappop(self._longest)
        self._released = max(self._released, len(shortest.token_ids))
        return [shortest]

    @property
    def limit(self) -> int | None:
        """The cut will not be later, so no response need grow longer; None while too many are unfinished to tell."""
        if self._left > self._size:
            return None
        if not self._left:
            return self._released
        # As if all that are left were longer. Cut responses are: they have been stopped at an earlier limit.
        length, _, _ = heapq.nlargest(1 + self._size - self._left, self._longest)[-1]
        return int(length)

    def split(self) -> tuple[list[Rollout], list[Rollout]]:
        """When all have come: those that are complete after all, and the beginnings of the others, up to the cut."""
        complete = [rollout for length, _, rollout in self._longest if length <= self._released]
        longer = [rollout for length, _, rollout in self._longest if length > self._released]
        self.discarded = sum(len(rollout.token_ids) - self._released for rollout in longer)
        return complete, [_head(rollout, self._released) for rollout in longer]


def _head(rollout: Rollout, length: int) -> Rollout:
    (precision, _), *_ = rollout.precisions
    return replace(
        rollout,
        token_ids=rollout.token_ids[:length],
        logprobs=rollout.logprobs[:length],
        sources=rollout.sources[:length],
        precisions=[(precision, length)],
        versions=[(rollout.policy_version, length)],
    )
