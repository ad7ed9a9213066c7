"""How `train` and `sft` begin: the checks, and what their trainers are built from."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megatron_rl.config import Config, ConfigError, save_config
from megatron_rl.config.model_fit import check_layout, read_hf_config
from megatron_rl.distributed.runtime import Runtime
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.token_ids import TokenIds, load_tokenizer, read_token_ids
from megatron_rl.trainer.checkpoint import damaged_checkpoints, latest_step

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """What a run begins with."""

    tokenizer: "PreTrainedTokenizerBase"
    arch: Architecture
    tokens: TokenIds
    """Which ids can be sampled, and which end a response."""
    resumed: int
    """Steps already done by an earlier run in `run_dir`."""


def begin(config: Config, runtime: Runtime) -> Start:
    """Check the experiment, and read the model folder.

    Raises:
        ConfigError: when the config does not fit the model, the number of processes or an earlier run, and when the
            processes do not have the same model.
    """
    _check_same_model(config, runtime)
    check_layout(config, read_hf_config(config.model.path, config.model.family), runtime.world_size)
    resumed = step_to_resume(config)
    if runtime.is_driver:
        logging.basicConfig(level=logging.WARNING, format="%(message)s")
        for folder, lost in damaged_checkpoints(config.run_dir).items():
            log.warning(
                "the checkpoint %s is damaged (%s) and is passed over: resuming after step %d", folder, lost, resumed
            )
    tokenizer = load_tokenizer(config.model.path)
    arch = Architecture.from_folder(config.model.path, config.model.family)
    return Start(tokenizer, arch, read_token_ids(config.model.path, tokenizer, arch.vocab_size), resumed)


def keep_config(config: Config, runtime: Runtime) -> None:
    """Write the resolved experiment to the run's folder, once nothing speaks against it; on the driver."""
    if runtime.is_driver:
        save_config(config, Path(config.run_dir) / "config.yaml")


def _check_same_model(config: Config, runtime: Runtime) -> None:
    """Each node has looked up a name on the hub by itself, and a branch may have moved, or a cache be old."""
    paths: list[str] = [""] * runtime.world_size
    torch.distributed.all_gather_object(paths, config.model.path, group=runtime.control_group)
    if len(found := sorted(set(paths))) > 1:
        raise ConfigError(
            f"the trainer processes have different models, {' and '.join(found)}; name the commit in model.path."
        )


def step_to_resume(config: Config) -> int:
    """Steps already done by an earlier run in `run_dir`, by the newest checkpoint that is whole.

    Raises:
        ConfigError: with `checkpoint.resume=never` when there is a checkpoint; when all that there are are damaged.
    """
    step = latest_step(config.run_dir)
    if step is None:
        for folder, lost in damaged_checkpoints(config.run_dir).items():
            raise ConfigError(
                f"the checkpoint {folder} is damaged ({lost}), and there is none that is whole; remove it to start "
                "from the beginning, or choose another run_dir."
            )
        return 0
    if config.checkpoint.resume == "never":
        raise ConfigError(
            f"run_dir={config.run_dir!r} holds a checkpoint of step {step} and checkpoint.resume=never; choose another "
            "run_dir, remove it, or set checkpoint.resume=auto."
        )
    return step
