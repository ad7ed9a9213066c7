"""What `rollout.async_steps` and `rollout.partial` do not go with."""

from typing import TYPE_CHECKING

from megatron_rl.config.errors import ConfigError

if TYPE_CHECKING:
    from megatron_rl.config.rollout import Rollout
    from megatron_rl.config.schema import Config


def asking(rollout: "Rollout") -> str | None:
    """The setting by which a response may have tokens of several policies, as `key=value`; None: there is none."""
    if rollout.async_steps:
        return f"rollout.async_steps={rollout.async_steps}"
    return "rollout.partial=true" if rollout.partial else None


def check_overlap(config: "Config") -> None:
    """Checks of the two keys against all others.

    Raises:
        ConfigError: naming the keys and the remedy.
    """
    rollout = config.rollout
    setting = asking(rollout)
    if setting is None:
        return
    if config.algorithm.dynamic_sampling:
        raise ConfigError(
            f"{setting} has more prompts under way than a step needs, so algorithm.dynamic_sampling="
            f"{config.algorithm.dynamic_sampling} cannot choose among those of one step; set one of them to its "
            "default (algorithm.dynamic_sampling=0)."
        )
    if rollout.history.mode != "off":
        raise ConfigError(
            f"{setting} samples a response with several policies, which rollout.history.mode={rollout.history.mode} "
            "cannot compare it with later; set mode to off."
        )
    if rollout.precision_tail or len(set(rollout.precisions)) > 1:
        raise ConfigError(
            f"{setting} needs engines of one precision, because a response goes on in any of them; let "
            f"rollout.quantization={rollout.quantization} be a single value."
        )
    _check_sampling(rollout, setting)
    if rollout.speculation.uses_head and "tails" in config.drafter.fill:
        raise ConfigError(
            f"{setting} does not wait for the tails of generation, which drafter.fill={config.drafter.fill} would "
            "fill; leave tails out of it."
        )
    if rollout.async_steps and rollout.sleep:
        raise ConfigError(
            f"{setting} generates while the trainer works, but rollout.sleep={rollout.sleep} gives the engines' memory "
            "to it; set one of them to 0."
        )


def _check_sampling(rollout: "Rollout", setting: str) -> None:
    if rollout.verify != "coupled":
        raise ConfigError(
            f"{setting} goes on with a response's noise after new weights, which rollout.verify={rollout.verify} does "
            "not know; set it to coupled."
        )
    for name in ("presence_penalty", "frequency_penalty"):
        if name in rollout.sampling:
            raise ConfigError(
                f"{setting} begins a response again where it was stopped, and rollout.sampling.{name} counts the "
                "tokens since then only; leave out one of them."
            )
