"""Fleets of several precisions: what each precision did, and which responses are the longest."""

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
    """Tokens past the limit, which quantized engines sampled and another engine replaced."""

    def add(self, precision: str, seconds: float) -> None:
        """Add the time for which an engine had requests."""
        self.seconds[precision] = self.seconds.get(precision, 0.0) + seconds


class LongestResponses:
    """The longest responses of a generation, which the engines without quantization finish.

    All responses are sorted by the length that the quantized engines alone would give them. The longest one that is not
    among the last `size` sets the limit; longer ones are truncated there. This depends on the responses only, not on
    when or where one of them was finished. A response that is shorter than `size` finished ones cannot be among the
    longest, so it is released at once.
    """

    def __init__(self, total: int, size: int) -> None:
        """
        Args:
            total: responses that will be added.
            size: most responses that are finished elsewhere; positive and smaller than `total`.
        """
        self._pending, self._size = total, size
        self._longest: list[tuple[float, int, Rollout]] = []  # a heap; the number settles ties
        self._released = 0  # length of the longest response that was released
        self.discarded = 0
        """Tokens past the limit; known after `split`."""

    def add(self, rollout: Rollout, truncated: bool) -> list[Rollout]:
        """Add a response; returns the complete one, if any, that now cannot be among the longest.

        Args:
            rollout: the response.
            truncated: it was ended at `limit`, or later, and is not complete.
        """
        self._pending -= 1
        length = math.inf if truncated else len(rollout.token_ids)
        heapq.heappush(self._longest, (length, self._pending, rollout))
        if len(self._longest) <= self._size:
            return []
        _, _, shortest = heapq.heappop(self._longest)
        self._released = max(self._released, len(shortest.token_ids))
        return [shortest]

    @property
    def limit(self) -> int | None:
        """An upper bound of the final limit: no response need be longer; None while too many are pending to know."""
        if self._pending > self._size:
            return None
        if not self._pending:
            return self._released
        # As if all pending ones were longer. Truncated responses are: they were stopped at an earlier limit.
        length, _, _ = heapq.nlargest(1 + self._size - self._pending, self._longest)[-1]
        return int(length)

    def split(self) -> tuple[list[Rollout], list[Rollout]]:
        """When all were added: those that turn out complete, and the others as partial responses, up to the limit."""
        complete = [rollout for length, _, rollout in self._longest if length <= self._released]
        longer = [rollout for length, _, rollout in self._longest if length > self._released]
        self.discarded = sum(len(rollout.token_ids) - self._released for rollout in longer)
        return complete, [_truncated(rollout, self._released) for rollout in longer]


def _truncated(rollout: Rollout, length: int) -> Rollout:
    (precision, _), *_ = rollout.precisions
    return replace(
        rollout,
        token_ids=rollout.token_ids[:length],
        logprobs=rollout.logprobs[:length],
        sources=rollout.sources[:length],
        precisions=[(precision, length)],
        versions=[(rollout.policy_version, length)],
    )
