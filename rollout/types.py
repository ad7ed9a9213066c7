"""What goes into the fleet and what comes out of it."""

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

# Keys of SamplingParams.extra_args.
SEED_KEY = "seed"  # decides the noise; a request that carries it takes part in coupled sampling
GROUP_KEY = "group"  # requests of one group are samples of one prompt
PAST_KEY = "past"  # a `Past`: an earlier response to draft from
LENIENCE_KEY = "lenience"  # that response is kept by the lenient rule; without it, by the coupled one
# Drafters of earlier responses, beside those of `rollout.speculation.bandit`: the sample's own, and what all of them
# have in common.
HISTORY, SUFFIX = "history", "suffix"
# Key of vLLM's additional_config: what `rollout.speculation.scheduler` is to do.
SPECULATION_KEY = "megatron_rl_speculation"


class TokenSource(IntEnum):
    """Where a token came from. All but KEPT are exact samples of the policy, and so tell only what was saved."""

    FRESH = 0  # sampled by the engine
    DRAFT = 1  # proposed by a drafter and verified
    HISTORY = 2  # what the sample's earlier response has at this place, and so all before it; verified
    KEPT = 3  # the same, by the lenient rule: no sample of the policy


@dataclass(frozen=True, eq=False)
class Past:
    """A sample's earlier response to the same prompt."""

    token_ids: NDArray[np.int32]  # [tokens]
    logprobs: NDArray[np.float32]  # [tokens]: the engine's, when it was generated
    seed: int


@dataclass(frozen=True)
class RolloutRequest:
    """One response to generate. `(prompt_id, sample_index)` is the stable key; `seed` decides the noise."""

    prompt_id: str
    sample_index: int
    epoch: int
    seed: int  # non-negative, below 2**63
    prompt_ids: list[int]
    max_tokens: int
    temperature: float  # 0 means greedy
    ignore_eos: bool = False  # go on to max_tokens: for benchmarks of a given length
    begun: list[int] = field(default_factory=list)  # tokens of the response that were sampled elsewhere or earlier
    past: Past | None = None  # what to draft from; with the same seed, or a lenience, it is expected to come again
    lenience: float | None = None  # keep `past` by the lenient rule, up to its first rejection


@dataclass(frozen=True)
class Rollout:
    """One generated response."""

    prompt_id: str
    sample_index: int
    epoch: int
    seed: int
    prompt_ids: list[int]
    token_ids: list[int]  # ends with the stop token when finish_reason is "stop"
    logprobs: list[float]  # one per token, of the distribution that was sampled (temperature and masks applied)
    finish_reason: str  # "stop" | "length" | "unfinished": it is to go on, see `rollout.fleet.fleet.More`
    policy_version: int  # of the weights that sampled the last token
    sources: list[TokenSource] = field(default_factory=list)  # one per token
    precisions: list[tuple[str, int]] = field(default_factory=list)
    """Whose tokens they are, in order: (entry of `rollout.quantization` of the engine, number of tokens)."""
    versions: list[tuple[int, int]] = field(default_factory=list)
    """By which weights they were sampled, in order: (policy version, number of tokens)."""


@dataclass
class SpeculationCounts:
    """What an engine's drafting did, in total since the last reading."""

    steps: int = 0
    verifications: int = 0  # rows of requests: a step verifies each live request once, with or without drafts
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
    """Drafter -> seconds that its accepted tokens saved; below 0 where its drafts cost more than they brought."""
    history_seconds: float = 0.0
    """Seconds of the steps that verified earlier responses, by these drafts' share of the rows."""
    tried_at: Counter[int] = field(default_factory=Counter)
    """EAGLE, place in the draft (from 0) -> drafts that were accepted up to there, and so put this place to the test.

    Live acceptance length: `1 + accepted_at.total() / tried_at[0]` tokens per verification."""
    accepted_at: Counter[int] = field(default_factory=Counter)
    """EAGLE, place in the draft -> how often its token was accepted."""
    drafter_version: int = 0
    """EAGLE: the head that drafts, see `RolloutFleet.update_drafter`; 0 is the one that the engine started with."""
