"""The best policy of a run by its evaluations: weights alone, in `run_dir/best`, which is a model folder."""

import json
from collections.abc import Mapping
from pathlib import Path

from megatron_rl.config import Config, ConfigError
from megatron_rl.config.heldout_sets import set_name, split_best
from megatron_rl.models.megatron_folder import write_model_folder
from megatron_rl.trainer.trainer import Trainer

RECORD = "best"  # `driver/best.json` in the folder: which metric, its value, after which step


def best_folder(config: Config) -> Path:
    """Where the best policy is."""
    return Path(config.run_dir) / "best"


def measured(config: Config, metrics: Mapping[str, float]) -> float | None:
    """The value of `eval.best` in the metrics of one evaluation; None when a set that it needs was not evaluated."""
    assert config.eval.best is not None
    name, kind = split_best(config.eval.best)
    names = [name] if name is not None else [set_name(spec) for spec in config.data.eval]
    values = [metrics.get(f"eval/{each}/{kind}") for each in names]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(names) else None


def improvement(config: Config, step: int, metrics: Mapping[str, float]) -> float | None:
    """The value of `eval.best` after `step` if it is above that of the policy kept so far, else None.

    What an earlier run left in the folder (`step` 0 begins a new one), or was kept by another metric, does not count.

    Raises:
        ConfigError: when the record of the policy kept so far cannot be read.
    """
    value = measured(config, metrics)
    file = best_folder(config) / "driver" / f"{RECORD}.json"
    if value is None or step == 0 or not file.is_file():
        return value
    try:
        kept = json.loads(file.read_text())
        return value if kept["metric"] != config.eval.best or value > kept["value"] else None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file} cannot be read ({error}); remove {best_folder(config)} to go on.") from None


def save_best(trainer: Trainer, config: Config, step: int, value: float) -> None:
    """Make the trainer's weights the best policy; on all ranks."""
    record = {"metric": config.eval.best, "value": value, "step": step}
    contents = {"model": trainer.model.sharded_state_dict()}
    write_model_folder(contents, config.model.path, best_folder(config), {RECORD: record})
