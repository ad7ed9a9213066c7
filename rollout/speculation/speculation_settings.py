"""What an engine tells its scheduler about drafting, and what the scheduler's rule has learned.

The settings travel as JSON-like values in vLLM's `additional_config`, so that each of vLLM's processes has them; the
learned state travels through the fleet into checkpoints.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from megatron_rl.config import Config, ConfigError
from megatron_rl.config.rollout import RENAMED_RULES
from rollout.speculation.arms import EAGLE, NGRAM
from rollout.speculation.bandit import RULES

SETTINGS_KEY = "megatron_rl_speculation"
"""Key of vLLM's `additional_config` that holds the settings."""


@dataclass(frozen=True)
class SpeculationSettings:
    """How an engine drafts: the part of `rollout.speculation` and `rollout.history` that the scheduler needs."""

    adaptive: str
    """As `rollout.speculation.adaptive`."""
    drafters: tuple[str, ...]
    """As `rollout.speculation.drafters`; empty where only earlier responses are drafted."""
    max_draft_tokens: int
    """Most draft tokens per request and step, of these drafters."""
    history_tokens: int
    """The same for drafts of earlier responses; 0: none."""
    max_bytes: int
    """Memory of the n-gram counts, in bytes."""
    seed: int
    """Of the choices that adaptive rules draw at random."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: for a value that no rule or drafter understands.
        """
        if self.adaptive not in RULES:
            raise ConfigError(f"{SETTINGS_KEY}.adaptive={self.adaptive!r} is not one of {', '.join(RULES)}.")
        if not set(self.drafters) <= {NGRAM, EAGLE}:
            raise ConfigError(f"{SETTINGS_KEY}.drafters={list(self.drafters)} may name {NGRAM} and {EAGLE} only.")
        for name in ("max_draft_tokens", "history_tokens", "max_bytes"):
            if not isinstance(value := getattr(self, name), int) or value < 0:
                raise ConfigError(f"{SETTINGS_KEY}.{name}={value!r} must be a whole number, 0 or more.")

    @classmethod
    def from_config(cls, config: Config) -> "SpeculationSettings | None":
        """The settings of an experiment; None when engines draft nothing."""
        speculation, history = config.rollout.speculation, config.rollout.history
        drafts, reuses = speculation.adaptive != "off", history.mode != "off"
        if not drafts and not reuses:
            return None
        return cls(
            adaptive=speculation.adaptive,
            drafters=tuple(speculation.drafters) if drafts else (),
            max_draft_tokens=speculation.max_draft_tokens,
            history_tokens=history.max_draft_tokens if reuses else 0,
            max_bytes=speculation.memory_mb * 2**20,
            seed=config.train.seed,
        )

    @classmethod
    def from_vllm(cls, additional_config: Mapping[str, Any]) -> "SpeculationSettings | None":
        """Read vLLM's `additional_config`; None when the engine drafts nothing.

        Raises:
            ConfigError: for settings with wrong keys or values.
        """
        values = additional_config.get(SETTINGS_KEY)
        if values is None:
            return None
        names = {field.name for field in fields(cls)}
        if wrong := sorted(names ^ values.keys()):
            raise ConfigError(f"additional_config.{SETTINGS_KEY} has a missing or unknown key: {', '.join(wrong)}.")
        return cls(**{**values, "drafters": tuple(values["drafters"])})

    def to_vllm(self) -> dict[str, Any]:
        """The value of vLLM's `additional_config`: JSON-like."""
        return {SETTINGS_KEY: asdict(self) | {"drafters": list(self.drafters)}}

    @property
    def uses_head(self) -> bool:
        """Whether an EAGLE head drafts."""
        return EAGLE in self.drafters

    @property
    def longest_draft(self) -> int:
        """Most draft tokens per request and step, of any drafter."""
        return max(self.max_draft_tokens if self.drafters else 0, self.history_tokens)


@dataclass(frozen=True)
class LearnedSpeculation:
    """What a rule of adaptive speculation has learned."""

    adaptive: str
    """The rule, as `rollout.speculation.adaptive`."""
    learned: dict[str, Any]
    """`Controller.state()`."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values (JSON), for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LearnedSpeculation":
        """Read what `to_dict` returned, also in runs from before the rules were renamed."""
        rule = str(values["adaptive"])
        return cls(RENAMED_RULES.get(rule, rule), values["learned"])
