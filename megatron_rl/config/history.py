"""The section `rollout.history`."""

from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator

from megatron_rl.config.section import Section


class LenienceBudgetConfig(Section):
    """How far from the policy the kept tokens may be, all together; `lenience` is adapted to it after every step."""

    measure: Literal["kl", "ess"] = "kl"
    """kl: estimated KL divergence per kept token from the policy that drew it to the current one; ess: effective sample
    size of their ratios, as a share of the kept tokens."""
    target: PositiveFloat = 0.01
    """The value to hold: nats for kl, a share below 1 for ess."""


class HistoryConfig(Section):
    """Reuse of the responses of earlier epochs (see `docs/history.md`)."""

    mode: Literal["off", "coupled", "lenient"] = "off"
    """off: every response is generated anew; coupled: a sample draws with the seed of its earlier response, which is
    verified as a draft, so responses remain exact samples of the policy; lenient: the earlier response is kept up to
    the first token that the rule of SPEC-RL rejects, which is faster and not exact."""
    lenience: float = Field(0.5, allow_inf_nan=True)
    """For lenient, in nats: a token is kept with probability `min(1, exp(lenience) * p_now / p_then)`. 0: the vanilla
    rule; .inf: keep all; -.inf: keep nothing."""
    budget: LenienceBudgetConfig | None = None
    """For lenient: adapt `lenience`, which is then where it starts; null: leave it as it is."""
    refresh: float = Field(0.1, ge=0, le=1)
    """Share of the samples that are drawn anew in each epoch, to keep exploring."""
    max_draft_tokens: int = Field(64, ge=1, le=128)
    """Most tokens of an earlier response that one engine step verifies, per request."""
    memory_mb: PositiveInt = 1024
    """Host memory for responses, in MiB; those that were stored longest ago are forgotten."""

    @field_validator("mode", mode="before")
    @classmethod
    def _off_is_no_boolean(cls, value: Any) -> Any:
        # YAML 1.1 reads a bare `off` as false.
        return "off" if value is False else value
