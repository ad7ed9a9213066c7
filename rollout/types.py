"""What goes into the fleet and what comes out of it."""

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

SEED_KEY = "seed"
"""Key of vLLM's `SamplingParams.extra_args`: requests that carry it take part in coupled sampling."""
# Drafters of earlier responses, beside those of `rollout.speculation.arms`: the sample's own, and what the earlier
# responses of all samples have in common.
HISTORY, SUFFIX = "history", "suffix"


class TokenSource(IntEnum):
    """Where a token came from. All but KEPT are exact samples of the policy: their source only says what was saved."""

    FRESH = 0
    """Sampled by the engine."""
    DRAFT = 1
    """Proposed by a drafter and verified."""
    HISTORY = 2
    """Verified, and the same as in the sample's earlier response, as are all tokens before it."""
    KEPT = 3
    """Kept from the earlier response by the lenient rule: no sample of the policy."""


@dataclass(frozen=True, eq=False)
class Past:
    """A sample's earlier response to the same prompt."""

    token_ids: NDArray[np.int32]
    """[tokens]."""
    logprobs: NDArray[np.float32]
    """[tokens]: the engine's, when the response was generated."""
    seed: int


@dataclass(frozen=True)
class RequestExtras:
    """What a request carries in vLLM's `SamplingParams.extra_args`, beside vLLM's own options."""

    seed: int | None = None
    """Decides the noise of coupled sampling; None: vLLM's own sampler."""
    group: str | None = None
    """Requests of one group are samples of one prompt; None: the request is a group by itself."""
    past: Past | None = None
    """An earlier response to draft from."""
    lenience: float | None = None
    """Keep that response by the lenient rule; None: by the coupled rule."""

    def to_dict(self) -> dict[str, Any]:
        """The value of `extra_args`: what is set."""
        return {name: value for name, value in vars(self).items() if value is not None}

    @classmethod
    def from_dict(cls, extra_args: Mapping[str, Any] | None) -> "RequestExtras":
        """Read the `extra_args` of a request, which may hold other keys as well."""
        given = extra_args or {}
        return cls(given.get(SEED_KEY), given.get("group"), given.get("past"), given.get("lenience"))


@dataclass(frozen=True)
class RolloutRequest:
    """One response to generate. `(prompt_id, sample_index, epoch)` is the stable key; `seed` decides the noise."""

    prompt_id: str
    sample_index: int
    epoch: int
    seed: int
    """Non-negative, below 2**63."""
    prompt_ids: list[int]
    max_tokens: int
    """Longest response, in tokens, `partial_ids` included."""
    temperature: float
    """0 means greedy."""
    ignore_eos: bool = False
    """Generate `max_tokens` whatever is sampled: for benchmarks of a given length."""
    partial_ids: list[int] = field(default_factory=list)
    """Tokens of the response that were sampled elsewhere or earlier; generation continues after them."""
    past: Past | None = None
    """What to draft from; with the same seed, or a lenience, the same response is expected again."""
    lenience: float | None = None
    """Keep `past` by the lenient rule, up to its first rejection."""


@dataclass(frozen=True)
class Rollout:
    """One generated response."""

    prompt_id: str
    sample_index: int
    epoch: int
    seed: int
    prompt_ids: list[int]
    token_ids: list[int]
    """Ends with the stop token when `finish_reason` is "stop"."""
    logprobs: list[float]
    """One per token, of the distribution that was sampled (temperature and masks applied)."""
    finish_reason: str
    """stop | length | unfinished: stopped early, to be continued (see `rollout.fleet.dispatcher.MoreRequests`)."""
    policy_version: int
    """Of the weights that sampled the last token."""
    sources: list[TokenSource] = field(default_factory=list)
    """One per token."""
    precisions: list[tuple[str, int]] = field(default_factory=list)
    """Which engines sampled the tokens, in order: (the engine's entry of `rollout.quantization`, number of tokens)."""
    versions: list[tuple[int, int]] = field(default_factory=list)
    """Which weights sampled the tokens, in order: (policy version, number of tokens)."""


@dataclass
class SpeculationCounts:
    """What an engine's drafting did, in total since the last reading."""

    steps: int = 0
    verifications: int = 0
    """Requests that were verified, summed over steps: each live request once per step, with or without drafts."""
    drafted: int = 0
    accepted: int = 0
    emitted: int = 0
    seconds: float = 0.0
    draft_seconds: float = 0.0
    chosen: Counter[tuple[int, str]] = field(default_factory=Counter)
    """(bucket of live batch sizes, arm) -> steps."""
    drafted_by: Counter[str] = field(default_factory=Counter)
    """Drafter -> draft tokens verified."""
    accepted_by: Counter[str] = field(default_factory=Counter)
    """Drafter -> draft tokens accepted."""
    saved_by: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Drafter -> seconds that its accepted tokens saved; below 0 where its drafts cost more than they saved."""
    history_seconds: float = 0.0
    """Seconds of the steps that verified earlier responses, weighted by these drafts' share of the rows."""
    tried_at: Counter[int] = field(default_factory=Counter)
    """EAGLE, position in the draft (from 0) -> drafts whose tokens before this position were all accepted, so that the
    token at this position was tested.

    Live acceptance length: `1 + accepted_at.total() / tried_at[0]` tokens per verification."""
    accepted_at: Counter[int] = field(default_factory=Counter)
    """EAGLE, position in the draft -> how often its token was accepted."""
    drafter_version: int = 0
    """EAGLE: the head that drafts, see `RolloutFleet.update_drafter`; 0 is the one that the engine started with."""


class TimelineStep(NamedTuple):
    """One step of an engine, for benchmarks."""

    started: float
    """In seconds, by `time.perf_counter`."""
    batch: int
    """Live requests."""
    arm: str
    emitted: int
    """Tokens."""
