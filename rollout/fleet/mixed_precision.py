"""Fleets of several precisions: who generates which prompt, and who finishes the longest responses."""

import heapq
import math
from collections import deque
from dataclasses import dataclass, field, replace

from rollout.types import Rollout, RolloutRequest, Source

RequestKey = tuple[str, int, int]  # prompt id, sample index, epoch: a step may straddle two epochs
Backlog = dict[str, deque[list[RolloutRequest]]]  # precision -> the requests of one prompt, of the next one, ...


def key_of(item: RolloutRequest | Rollout) -> RequestKey:
    """What is stable about a response."""
    return item.prompt_id, item.sample_index, item.epoch


def deal(requests: list[RolloutRequest], precisions: list[str]) -> Backlog:
    """Requests by prompt, prompts in the order of their first request, dealt to the precisions of the engines in turn.

    Engines of one precision share what falls to it, as they have time: which of them is asked changes no token.
    """
    groups: dict[str, list[RolloutRequest]] = {}
    for request in requests:
        groups.setdefault(request.prompt_id, []).append(request)
    backlog: Backlog = {precision: deque() for precision in precisions}
    for place, group in enumerate(groups.values()):
        backlog[precisions[place % len(precisions)]].append(group)
    return backlog


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


def go_on(request: RolloutRequest, begun: Rollout) -> RolloutRequest:
    """What is left of a request whose response has begun elsewhere, or earlier.

    Of the sample's earlier response, what comes after the tokens that it has in common with the new one: none where it
    differs already.
    """
    past, length = request.past, len(begun.token_ids)
    if past is not None and all(source in (Source.HISTORY, Source.KEPT) for source in begun.sources):
        past = replace(past, token_ids=past.token_ids[length:], logprobs=past.logprobs[length:])
    else:
        past = None
    return replace(request, begun=begun.token_ids, past=past)


def join(begun: Rollout, rest: Rollout) -> Rollout:
    """A response of which the beginning was sampled elsewhere, or earlier, than the rest."""
    return replace(
        rest,
        token_ids=begun.token_ids + rest.token_ids,
        logprobs=begun.logprobs + rest.logprobs,
        sources=begun.sources + rest.sources,
        precisions=begun.precisions + rest.precisions,
        versions=begun.versions + rest.versions,
    )
