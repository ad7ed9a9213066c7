"""How the command line changes an experiment for `megatron-rl eval`, and what its results depend on. Without torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_rl.config import Config, ConfigError
from megatron_rl.config.heldout_sets import set_name
from megatron_rl.config.history import HistoryConfig
from megatron_rl.config.hub import is_hub_name, local_folder, pin, split_name
from megatron_rl.config.load import describe
from megatron_rl.evaluation.results import file_name


def for_evaluation(
    config: Config, checkpoint: str | Path | None, sets: Sequence[str], seed: int | None, output: Path | None
) -> Config:
    """The experiment as `run` wants it: another policy, sets and seed, and `run_dir` the folder of the results.

    The default folder is `run_dir/eval/<name of the checkpoint's folder>`, of a model on the hub `<Name>@<commit>`.

    Raises:
        ConfigError: when the checkpoint is not a model, the sets or the drafter cannot be used.
    """
    path = pin(str(checkpoint), "--checkpoint ") if checkpoint is not None else config.model.path
    if checkpoint is not None and weights_file(local_folder(path)) is None:
        raise ConfigError(
            f"--checkpoint {checkpoint} holds neither *.safetensors nor megatron/metadata.json; give a folder such as "
            "run_dir/checkpoints/step_000020, run_dir/best or run_dir/hf."
        )
    changed = {
        "model": config.model.model_copy(update={"path": path}),
        "data": config.data.model_copy(update={"eval": list(sets) or config.data.eval}),
        "train": config.train if seed is None else config.train.model_copy(update={"seed": seed}),
        "drafter": config.drafter.model_copy(update={"path": _drafter(config)}),
        # There are no earlier responses; best and schedule may name other sets.
        "rollout": config.rollout.model_copy(update={"history": HistoryConfig()}),
        "eval": config.eval.model_copy(update={"best": None, "schedule": {}}),
        "run_dir": str(output or Path(config.run_dir) / "eval" / _folder_name(path)),
    }
    try:
        evaluated = Config.model_validate(config.model_copy(update=changed).model_dump())
    except ValidationError as error:
        raise ConfigError(describe(error)) from None
    names = [set_name(spec) for spec in evaluated.data.eval]
    if not names:
        raise ConfigError("data.eval is empty; name the sets to evaluate with --sets.")
    if len({file_name(name) for name in names}) < len(names):
        raise ConfigError(f"--sets {','.join(names)}: two sets would write the same file; evaluate them separately.")
    return evaluated


def _folder_name(path: str) -> str:
    if not is_hub_name(path):
        return Path(path).resolve().name
    repo, commit = split_name(path)
    return repo.partition("/")[2] + (f"@{commit[:8]}" if commit else "")


def _drafter(config: Config) -> str | None:
    """The head to draft with: `drafter.path`, else the one that the run has written."""
    if not config.rollout.speculation.uses_head or config.drafter.path is not None:
        return config.drafter.path
    written = Path(config.run_dir) / "drafter"
    if not written.is_dir():
        raise ConfigError(
            "rollout.speculation.drafters has eagle, but there is no trained head; set drafter.path or leave eagle out."
        )
    return str(written)


def weights_file(folder: Path) -> Path | None:
    """A file with weights of a model folder, by whose time a change of the weights is noticed; None without weights."""
    megatron = folder / "megatron" / "metadata.json"
    return megatron if megatron.is_file() else next(iter(sorted(folder.glob("*.safetensors"))), None)


def settings(config: Config) -> dict[str, Any]:
    """What the results depend on, apart from the sets; quantization and precision are part of it, speed is not."""
    rollout = config.rollout
    path = config.model.path
    file = weights_file(Path(path))  # a commit on the hub cannot change
    return {
        "checkpoint": path if is_hub_name(path) else str(Path(path).resolve()),
        "weights saved at": file.stat().st_mtime if file is not None else None,
        "model.precision": config.model.precision,
        "train.seed": config.train.seed,
        "eval.samples": config.eval.samples,
        "data.max_prompt_tokens": config.data.max_prompt_tokens,
        "data.templates": config.data.templates,
        "reward": config.reward.model_dump(mode="json"),
        **{
            f"rollout.{name}": getattr(rollout, name)
            for name in (
                "max_tokens",
                "temperature",
                "sampling",
                "sampler",
                "quantization",
                "quantization_skip",
                "quantization_profile",
                "precision_tail",
                "lm_head_fp32",
            )
        },
    }
