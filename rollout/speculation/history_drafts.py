"""Drafts from earlier responses to the same prompt, for `rollout.speculation.scheduler`.

A request whose earlier response is expected again (`Past`: drawn with the same seed, or kept leniently) drafts what
that response has next, tens of tokens at a time. The first token that differs ends this. From then on, and from the
start for a request whose `Past` is only a source of drafts, the n-gram drafter proposes what followed the same tokens
in the earlier responses of all samples of the prompt, so that a short difference does not lose the rest.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from vllm.v1.request import Request

from rollout.sampling.lenient import LenientDraft
from rollout.speculation.ngram_requests import NgramRequests, extras_of
from rollout.types import HISTORY, SUFFIX, TokenSource

_CONTEXT = 24
"""Tokens before a difference that the n-gram drafter gets as context."""
_FADE = 0.999
"""Weight of a tested draft token relative to the next one."""
_PRIOR = (99.0, 100.0)
"""Accepted and tried tokens that are assumed before any is tested: about 1 in 100 differs."""


class HistoryDraft(NamedTuple):
    """What a request drafts from earlier responses."""

    drafter: str
    """`HISTORY` or `SUFFIX`."""
    token_ids: list[int]


@dataclass
class _Reuse:
    """A request's earlier response, and how much of it was reused."""

    tokens: list[int]
    logprobs: list[float]
    lenience: float | None
    group: str
    continues: bool
    """All that was emitted is the same as in the earlier response."""
    kept: int = 0
    """Tokens at the beginning that are the same."""


@dataclass
class HistoryDrafts:
    """Drafts for the requests that have an earlier response; all others are left alone."""

    max_draft_tokens: int
    max_bytes: int
    """Memory of the n-gram drafter."""
    _requests: dict[str, _Reuse] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._ngram = NgramRequests(max(self.max_draft_tokens, 1), self.max_bytes)
        self._accepted, self._tried = _PRIOR
        self._finished: dict[str, tuple[int, TokenSource]] = {}

    def start(self, request: Request) -> None:
        """Begin a request."""
        extras = extras_of(request)
        past = extras.past
        if past is None:
            return
        group, tokens = str(extras.group or request.request_id), past.token_ids.tolist()
        # A preempted or resumed request starts with what it has emitted already.
        expected = extras.lenience is not None or extras.seed == past.seed
        continues = expected and request.num_output_tokens == 0
        self._requests[request.request_id] = _Reuse(tokens, past.logprobs.tolist(), extras.lenience, group, continues)
        self._ngram.add_text(group, (request.prompt_token_ids or [])[-_CONTEXT:], tokens)

    def finish(self, request: Request) -> None:
        """End a request."""
        if (reuse := self._requests.pop(request.request_id, None)) is None:
            return
        source = TokenSource.HISTORY if reuse.lenience is None else TokenSource.KEPT
        self._finished[request.request_id] = reuse.kept, source
        if request in self._ngram:
            self._ngram.finish(request)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._requests

    def take_kept(self, request_id: str) -> tuple[int, TokenSource]:
        """How many tokens at the beginning of a finished request are those of its earlier response; forgets them."""
        return self._finished.pop(request_id, (0, TokenSource.HISTORY))

    def propose(
        self, ready: Iterable[Request], room: Callable[[Request], int], threshold: float
    ) -> dict[str, HistoryDraft]:
        """Draft for the decoding requests.

        Args:
            ready: the requests.
            room: request -> most draft tokens that it can use.
            threshold: a draft token that is accepted with a lower probability costs more time than it saves.

        Returns:
            Request id -> draft, for the requests that have one.
        """
        if not self._requests:
            return {}
        drafts: dict[str, HistoryDraft] = {}
        length = self._length(threshold)
        differing: list[Request] = []
        for request in ready:
            reuse = self._requests.get(request.request_id)
            if reuse is None:
                continue
            if reuse.continues:
                position = request.num_output_tokens
                if draft := reuse.tokens[position : position + min(length, room(request))]:
                    drafts[request.request_id] = HistoryDraft(HISTORY, draft)
            else:
                differing.append(request)
        for request, draft in zip(differing, self._propose_suffixes(differing, room, threshold), strict=True):
            if draft:
                drafts[request.request_id] = HistoryDraft(SUFFIX, draft)
        return drafts

    def _length(self, threshold: float) -> int:
        """As many tokens as are all accepted with the probability `threshold`, by recent acceptance."""
        chance = self._accepted / self._tried
        wanted = math.log(threshold) / math.log(chance) if chance < 1 else math.inf
        return int(min(max(wanted, 1), self.max_draft_tokens))

    def _propose_suffixes(
        self, requests: Sequence[Request], room: Callable[[Request], int], threshold: float
    ) -> list[list[int]]:
        if not requests:
            return []
        for request in requests:
            if request not in self._ngram:
                group = self._requests[request.request_id].group
                self._ngram.start(request, group, list(request.all_token_ids[-_CONTEXT:]))
        drafts = self._ngram.propose(requests, [room(request) for request in requests], threshold)
        return drafts.token_lists(len(requests))

    def lenient_drafts(self, scheduled: Any, requests: dict[str, Request]) -> dict[str, LenientDraft]:
        """What the lenient rule has to decide in a step, by request id.

        Args:
            scheduled: vLLM's `SchedulerOutput` of the step.
            requests: the scheduler's requests by id.
        """
        drafts: dict[str, LenientDraft] = {}
        if not self._requests:
            return drafts
        for name in scheduled.num_scheduled_tokens:
            reuse = self._requests.get(name)
            if reuse is None or reuse.lenience is None or not reuse.continues:
                continue
            begin = requests[name].num_output_tokens
            end = begin + len(scheduled.scheduled_spec_decode_tokens.get(name, ()))
            more = end < len(reuse.tokens)
            drafts[name] = LenientDraft(
                lenience=reuse.lenience,
                logprobs=reuse.logprobs[begin:end],
                next_token=reuse.tokens[end] if more else None,
                next_logprob=reuse.logprobs[end] if more else 0.0,
            )
        return drafts

    def record_verified(self, request: Request, drafted: int, emitted: Sequence[int], last_kept: bool) -> None:
        """Note what a step emitted for a request.

        Args:
            request: as it was before the step.
            drafted: its draft tokens in the step.
            emitted: the tokens.
            last_kept: the token after all drafts was kept by the lenient rule.
        """
        reuse = self._requests.get(request.request_id)
        if reuse is None or not reuse.continues:
            return
        begin, accepted = request.num_output_tokens, len(emitted) - 1
        if reuse.lenience is None:
            expected = reuse.tokens[begin : begin + len(emitted)]
            same = next((i for i, pair in enumerate(zip(emitted, expected, strict=False)) if pair[0] != pair[1]), None)
            kept = len(expected) if same is None else same
        else:
            kept = accepted + last_kept
        reuse.kept += kept
        reuse.continues = kept == len(emitted) and begin + kept < len(reuse.tokens)
        tried = min(accepted + 1, drafted)
        fade = _FADE**tried
        self._accepted = self._accepted * fade + accepted
        self._tried = self._tried * fade + tried
