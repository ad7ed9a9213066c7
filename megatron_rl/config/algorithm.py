"""The section `algorithm` of an experiment file: the policy gradient, and what the published algorithms set in it."""

import difflib
import re
from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from megatron_rl.config.errors import ConfigError
from megatron_rl.config.section import Section

PRESETS: dict[str, dict[str, Any]] = {
    "grpo": {},
    "dr_grpo": {"normalize_std": False, "aggregation": "seq-mean-token-sum-norm"},
    "dapo": {"clip_high": 0.28, "dynamic_sampling": 9},
    "rloo": {"aggregation": "seq-mean-token-sum-norm"},
    "reinforce_pp": {},
    "reinforce_pp_baseline": {},
    "gspo": {"clip_low": 3e-4, "clip_high": 4e-4, "aggregation": "seq-mean-token-mean"},
    "cispo": {"clip_low": 1.0, "clip_high": 4.0},
    "ppo": {},
}
"""Built-in algorithms, and the keys of the section whose defaults they change; `docs/algorithms.md` has the sources."""


WITHOUT_GROUPS = ("reinforce_pp", "ppo")
"""Those that do not compare the responses to one prompt."""


class KlConfig(Section):
    """Penalty for moving away from the reference model (the policy at step 0)."""

    coef: float = Field(0.0, ge=0)
    """Weight of the penalty; 0 turns it off and loads no reference model."""
    estimator: Literal["k1", "k2", "k3"] = "k3"
    """Per-token estimator of the KL divergence (Schulman, 'Approximating KL divergence')."""
    place: Literal["loss", "reward"] = "loss"
    """loss: a term of the loss; reward: taken off the reward of every token, for algorithms with a critic (ppo) only,
    usually with estimator k1."""


class CriticConfig(Section):
    """The critic of `ppo`: a second model with the policy's shape and layout, which starts from the policy's weights
    and gives each token one number instead of logits."""

    lr: PositiveFloat = 1e-5
    """Peak learning rate of its own optimizer; schedule, decay and clipping are those of `train`."""
    clip: PositiveFloat | None = 0.2
    """How far an update may move a value, in units of the reward; null: no bound."""
    warmup_steps: int = Field(0, ge=0)
    """First RL steps, which train the critic alone."""
    gamma: float = Field(1.0, ge=0, le=1)
    """Discount per token."""
    lam: float = Field(1.0, ge=0, le=1)
    """Lambda of generalized advantage estimation. 1: the reward that follows less the critic's value; smaller: less
    variance, more of the critic's errors. With the reward at the end, the first of n tokens sees `lam^n` of it."""


class CorrectionConfig(Section):
    """Correction for the difference between the engine that generated and the trainer that learns (see
    `docs/correction.md`)."""

    kind: Literal["none", "tis", "mask"] = "tis"
    """tis: truncated importance sampling, the token loss times `min(ratio, cap)`, `ratio = exp(old - rollout)`; mask
    (masked importance sampling): the loss times the ratio, and no training on tokens whose ratio is outside
    [floor, cap]. IcePop is mask with a floor and `denominator: all`."""
    level: Literal["token", "sequence", "geometric"] = "token"
    """Whose ratio counts, as the weight and for the bounds. token: the token's own; sequence: the product over the
    response; geometric: the geometric mean over the response (for mask only)."""
    cap: float = Field(2.0, ge=1)
    """Largest ratio: larger ones are cut (tis) or rejected (mask)."""
    floor: float | None = Field(None, gt=0, le=1)
    """Smallest ratio of mask: smaller ones are rejected; null: no lower bound."""
    denominator: Literal["kept", "all"] = "kept"
    """What the loss of the tokens that are left is divided by where some are rejected. kept: their own number, or that
    of the responses with any; all: the number before the rejection, so that a step learns less where it rejects more
    (IcePop)."""
    veto: float | None = Field(None, gt=0, lt=1)
    """Reject every response that has a token with a ratio below this, such as 1e-4, whatever the kind; null: none."""
    normalize: bool = False
    """Divide the weights by their mean over the mini-batch."""
    reused: Literal["correct", "mask", "leave"] = "correct"
    """Tokens that `rollout.history.mode=lenient` kept of earlier responses. correct: as fresh ones, by the current
    engine's log-probs; mask: no training on them; leave: their ratio counts as 1."""

    @property
    def compares_responses(self) -> bool:
        """Whether what it makes of a response depends on others of the mini-batch: by rejection, which changes how much
        the rest counts, or by normalization."""
        return self.kind == "mask" or self.veto is not None or self.reused == "mask" or self.normalize


class AlgorithmConfig(Section):
    """The policy-gradient algorithm (see `docs/algorithms.md`). The name decides the defaults of some other keys."""

    name: str = "grpo"
    """grpo, dr_grpo, dapo, rloo, reinforce_pp, reinforce_pp_baseline, gspo, cispo, ppo, or a class of yours as
    `package.module:Class`."""
    options: dict[str, Any] = Field(default_factory=dict)
    """What a class of yours wants to know; the built-in algorithms take nothing here."""
    group_size: PositiveInt = 8
    """Responses per prompt; 1 only where they are not compared with each other (ppo, reinforce_pp)."""
    normalize_std: bool = True
    """Divide the group-relative reward by the group's standard deviation (dr_grpo: false; rloo and reinforce_pp* have
    rules of their own); ppo: normalize the advantages over all response tokens of the step."""
    clip_low: float = Field(0.2, gt=0, le=1)
    """The probability ratio is clipped at `1 - clip_low`; 1: no lower bound (gspo: 3e-4; cispo: 1)."""
    clip_high: PositiveFloat = 0.2
    """The probability ratio is clipped at `1 + clip_high` (dapo: 0.28; gspo: 4e-4; cispo: 4)."""
    dual_clip: float | None = Field(None, gt=1)
    """Bound `c` of the loss for negative advantages (dual-clip PPO); null: none."""
    entropy_coef: float = Field(0.0, ge=0)
    """Weight of the entropy bonus."""
    aggregation: Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean"] = (
        "token-mean"
    )
    """How token losses become one number; -norm: the sum of a response's tokens divided by `rollout.max_tokens`
    (dr_grpo, rloo: seq-mean-token-sum-norm; gspo: seq-mean-token-mean)."""
    dynamic_sampling: int = Field(0, ge=0)
    """Replace prompts whose responses all have the same reward, which teach nothing, by the next ones, up to this many
    times `train.prompts_per_step` in a step (dapo: 9); 0: no replacement."""
    kl: KlConfig = KlConfig()
    """Penalty for moving away from the reference."""
    critic: CriticConfig = CriticConfig()
    """The critic, for algorithms that have one (ppo)."""
    correction: CorrectionConfig = CorrectionConfig()
    """Train/rollout mismatch correction."""

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        name = values.get("name", "grpo")
        return PRESETS[name] | values if isinstance(name, str) and name in PRESETS else values

    @model_validator(mode="after")
    def _check(self) -> "Algorithm":
        if self.name in PRESETS:
            if self.options:
                raise ConfigError(
                    f"algorithm.options has {', '.join(self.options)}, but algorithm.name={self.name} takes no "
                    "options; leave them out."
                )
            if self.group_size == 1 and (self.dynamic_sampling or self.name not in WITHOUT_GROUPS):
                reason = "dynamic_sampling" if self.name in WITHOUT_GROUPS else f"name={self.name}"
                raise ConfigError(
                    f"algorithm.group_size=1 leaves nothing to compare a response with, which algorithm.{reason} does; "
                    "give at least 2."
                )
            return self
        if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", self.name):
            near = difflib.get_close_matches(self.name, PRESETS, 1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise ConfigError(
                f"algorithm.name={self.name!r} is not known{hint}; choose one of {', '.join(PRESETS)}, or give "
                "a class of yours as package.module:Class."
            )
        return self
