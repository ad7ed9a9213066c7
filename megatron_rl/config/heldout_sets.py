"""Names and schedule of the held-out sets, and the checks of what the config says about them."""

from typing import TYPE_CHECKING

from megatron_rl.config.errors import ConfigError

if TYPE_CHECKING:
    from megatron_rl.config.schema import Config

PUBLIC_SETS = ("gsm8k", "math500", "amc23", "aime24", "aime25", "minerva", "olympiadbench", "mmlu_stem")
"""Sets that go by these names, as `NAME` or `NAME=FILE`; `megatron_rl.data.public` knows where they are."""

KINDS = ("greedy_accuracy", "avg_at_k", "pass_at_k", "majority_at_k")
"""What an evaluation measures of each set: metrics are called `eval/SET/KIND`."""


def set_name(spec: str) -> str:
    """The name of a set of `data.eval` in metrics and files: without the file of `NAME=FILE`."""
    name = spec.partition("=")[0]
    return name if name in PUBLIC_SETS else spec


def due_sets(config: "Config", step: int) -> list[str]:
    """Entries of `data.eval` to evaluate after `step`: all before the first step (0) and after the last."""
    evaluation = config.eval
    if step in (0, config.train.steps):
        return list(config.data.eval)
    every = {spec: evaluation.schedule.get(set_name(spec), evaluation.every) for spec in config.data.eval}
    return [spec for spec, steps in every.items() if steps > 0 and step % steps == 0]


def split_best(best: str) -> tuple[str | None, str]:
    """(set or None for the mean over all, kind) of `eval.best`."""
    name, _, kind = best.rpartition("/")
    return name or None, kind


def check_evaluation(config: "Config") -> None:
    """Do `data.eval`, `data.templates` and `eval.*` fit together?

    Raises:
        ConfigError: naming the keys and the remedy.
    """
    names = [set_name(spec) for spec in config.data.eval]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"data.eval names {twice!r} twice; leave one of them out.")
    for name, template in config.data.templates.items():
        if name not in PUBLIC_SETS:
            raise ConfigError(
                f"data.templates.{name} is for no public set; they are {', '.join(PUBLIC_SETS)}. Other sets hold whole "
                "prompts."
            )
        if "{problem}" not in template:
            raise ConfigError(f"data.templates.{name}={template!r} has no {{problem}}, where the problem goes.")
    for name in config.eval.schedule:
        if name not in names:
            raise ConfigError(f"eval.schedule.{name} is for no set of data.eval; it has {', '.join(names) or 'none'}.")
    if config.eval.best is not None:
        _check_best(config.eval.best, names, config.eval.samples)


def _check_best(best: str, names: list[str], samples: int) -> None:
    name, kind = split_best(best)
    if kind not in KINDS:
        raise ConfigError(f"eval.best={best!r} must be KIND or SET/KIND, where KIND is one of {', '.join(KINDS)}.")
    if not names or (name is not None and name not in names):
        raise ConfigError(f"eval.best={best!r} is of no set of data.eval; it has {', '.join(names) or 'none'}.")
    if kind != "greedy_accuracy" and not samples:
        raise ConfigError(f"eval.best={best!r} needs sampled responses; set eval.samples, or use greedy_accuracy.")
