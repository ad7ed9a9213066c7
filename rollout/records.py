"""What goes into the fleet and what comes out of it."""

from dataclasses import dataclass


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
    finish_reason: str  # "stop" | "length"
    policy_version: int
