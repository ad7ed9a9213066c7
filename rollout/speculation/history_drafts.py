"""Drafts from earlier responses to the same prompt, for `rollout.speculation.scheduler`.

A request whose earlier response is expected to come again (`Past`: drawn with the same seed, or kept leniently) drafts
what that response has next, tens of tokens at a time. The first token that differs ends this. From then on, and from
the start for a request that only has a `Past` to look at, the n-gram drafter proposes what followed the same tokens in
the earlier responses of all samples of the prompt, so that a small detour does not lose the rest.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm.v1.request import Request

from rollout.sampling.lenient import Judged
from rollout.speculation.ngram import NgramDrafter
from rollout.types import GROUP_KEY, HISTORY, LENIENCE_KEY, PAST_KEY, SEED_KEY, SUFFIX, Past, TokenSource

_CONTEXT = 24  # tokens before a detour that the n-gram drafter is shown
_FADE = 0.999  # per draft token that was put to the test
_BEGIN = (99.0, 100.0)  # accepted and tried tokens that were seen before anything was: about 1 in 100 differs


@dataclass
class _Reuse:
    """A request's earlier response, and how far it has come again."""

    tokens: list[int]
    logprobs: list[float]
    lenience: float | None
    group: str
    goes_on: bool  # all that was emitted is what the earlier response has
    kept: int = 0  # tokens at the beginning that came again
    number: int | None = None  # in the n-gram drafter, once it is told of the request
    told: int = 0  # output tokens that it knows of


@dataclass
class HistoryDrafts:
    """What the scheduler asks, for requests with an earlier response; nothing for all others."""

    max_draft_tokens: int
    max_bytes: int
    """Memory of the n-gram drafter."""
    _requests: dict[str, _Reuse] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._ngram = NgramDrafter(max(self.max_draft_tokens, 1), self.max_bytes)
        self._started = 0
        self._accepted, self._tried = _BEGIN
        self._done: dict[str, tuple[int, TokenSource]] = {}

    def start(self, request: Request) -> None:
        """A request begins."""
        extra = (request.sampling_params.extra_args if request.sampling_params else None) or {}
        past: Past | None = extra.get(PAST_KEY)
        if past is None:
            return
        group, lenience = str(extra.get(GROUP_KEY, request.request_id)), extra.get(LENIENCE_KEY)
        tokens = past.token_ids.tolist()
        goes_on = lenience is not None or extra.get(SEED_KEY) == past.seed
        # A preempted or resumed request begins with what it has emitted already.
        goes_on = goes_on and request.num_output_tokens == 0
        self._requests[request.request_id] = _Reuse(tokens, past.logprobs.tolist(), lenience, group, goes_on)
        self._started += 1
        self._ngram.start(self._started, group, (request.prompt_token_ids or [])[-_CONTEXT:])
        self._ngram.extend([self._started], [tokens])
        self._ngram.finish(self._started)

    def finish(self, request: Request) -> None:
        """The request ends."""
        if (reuse := self._requests.pop(request.request_id, None)) is None:
            return
        self._done[request.request_id] = reuse.kept, TokenSource.HISTORY if reuse.lenience is None else TokenSource.KEPT
        if reuse.number is not None:
            self._ngram.finish(reuse.number)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._requests

    def take_kept(self, request_id: str) -> tuple[int, TokenSource]:
        """How many tokens a finished request has of its earlier response, from the beginning; forgets them."""
        return self._done.pop(request_id, (0, TokenSource.HISTORY))

    def propose(
        self, ready: Iterable[Request], room: Callable[[Request], int], threshold: float
    ) -> dict[str, tuple[str, list[int]]]:
        """Request id -> drafter and draft, for those of the decoding requests that have one.

        `room` gives the draft tokens that a request can use; `threshold` is the chance of acceptance below which a
        draft token costs more than it brings.
        """
        if not self._requests:
            return {}
        drafts: dict[str, tuple[str, list[int]]] = {}
        length = self._length(threshold)
        detours: list[Request] = []
        for request in ready:
            reuse = self._requests.get(request.request_id)
            if reuse is None:
                continue
            if reuse.goes_on:
                place = request.num_output_tokens
                if draft := reuse.tokens[place : place + min(length, room(request))]:
                    drafts[request.request_id] = HISTORY, draft
            else:
                detours.append(request)
        for request, draft in zip(detours, self._propose_suffixes(detours, room, threshold), strict=True):
            if draft:
                drafts[request.request_id] = SUFFIX, draft
        return drafts

    def _length(self, threshold: float) -> int:
        """As many tokens as are all accepted with a chance of `threshold`, by what was accepted of late."""
        chance = self._accepted / self._tried
        wanted = math.log(threshold) / math.log(chance) if chance < 1 else math.inf
        return int(min(max(wanted, 1), self.max_draft_tokens))

    def _propose_suffixes(
        self, requests: Sequence[Request], room: Callable[[Request], int], threshold: float
    ) -> list[list[int]]:
        if not requests:
            return []
        numbers, late, new = [], [], []
        for request in requests:
            reuse = self._requests[request.request_id]
            if reuse.number is None:
                self._started += 1
                reuse.number, reuse.told = self._started, request.num_output_tokens
                self._ngram.start(reuse.number, reuse.group, list(request.all_token_ids[-_CONTEXT:]))
            elif request.num_output_tokens > reuse.told:
                late.append(reuse.number)
                new.append(request.output_token_ids[reuse.told :])
                reuse.told = request.num_output_tokens
            numbers.append(reuse.number)
        if late:
            self._ngram.extend(late, new)
        drafts = self._ngram.propose(numbers, [room(request) for request in requests], threshold)
        lengths = drafts.lengths[: len(numbers)].tolist()
        tokens = drafts.tokens[: len(numbers)].tolist()
        return [draft[:length] for draft, length in zip(tokens, lengths, strict=True)]

    def judged(self, scheduled: Any, requests: dict[str, Request]) -> dict[str, Judged]:
        """What the lenient rule has to decide in a scheduled step, by request."""
        asked: dict[str, Judged] = {}
        if not self._requests:
            return asked
        for name in scheduled.num_scheduled_tokens:
            reuse = self._requests.get(name)
            if reuse is None or reuse.lenience is None or not reuse.goes_on:
                continue
            begin = requests[name].num_output_tokens
            end = begin + len(scheduled.scheduled_spec_decode_tokens.get(name, ()))
            more = end < len(reuse.tokens)
            asked[name] = Judged(
                reuse.lenience,
                reuse.logprobs[begin:end],
                reuse.tokens[end] if more else None,
                reuse.logprobs[end] if more else 0.0,
            )
        return asked

    def verified(self, request: Request, drafted: int, emitted: Sequence[int], last_kept: bool) -> None:
        """A request, as it was before the step, has emitted these tokens.

        `drafted` tokens were verified; `last_kept` says that the token after all of them was kept leniently.
        """
        reuse = self._requests.get(request.request_id)
        if reuse is None or not reuse.goes_on:
            return
        begin, accepted = request.num_output_tokens, len(emitted) - 1
        if reuse.lenience is None:
            expected = reuse.tokens[begin : begin + len(emitted)]
            same = next((i for i, pair in enumerate(zip(emitted, expected, strict=False)) if pair[0] != pair[1]), None)
            came_again = len(expected) if same is None else same
        else:
            came_again = accepted + last_kept
        reuse.kept += came_again
        reuse.goes_on = came_again == len(emitted) and begin + came_again < len(reuse.tokens)
        tried = min(accepted + 1, drafted)
        fade = _FADE**tried
        self._accepted = self._accepted * fade + accepted
        self._tried = self._tried * fade + tried
