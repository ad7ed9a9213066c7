"""Checkpoints: written atomically, the newest few kept, independent of the parallel layout.

A checkpoint folder `run_dir/checkpoints/step_000020/` holds `megatron/` (megatron-core's dist_checkpointing: model,
optimizer, and a small dict of plain values) beside the model's `config.json` and tokenizer, so that it is a model
folder by itself; `driver/`, files of what the driver's parts want to keep; and `manifest`, the sizes of all these
files. A checkpoint that does not match its manifest does not count, and is left alone.
"""

import json
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding

from megatron_rl.config import ConfigError
from megatron_rl.models.manifest import damage
from megatron_rl.models.megatron_folder import _load, _read, write_model_folder
from megatron_rl.models.model_folder import DRAFT, REPLACED

if TYPE_CHECKING:
    from megatron_rl.trainer.trained_model import TrainedModel

CRITIC = "critic"  # in checkpoints: its model and optimizer
# The form of the optimizer state that loads into any other TP, PP or DP layout.
OPTIMIZER_FORMAT = {"distrib_optim_sharding_type": "fully_reshardable"}


def checkpoint_folder(run_dir: str | Path, step: int) -> Path:
    """Where the checkpoint of `step` is."""
    return Path(run_dir) / "checkpoints" / f"step_{step:06d}"


def latest_step(run_dir: str | Path) -> int | None:
    """Step of the newest complete checkpoint, or None."""
    return max(_steps(run_dir), default=None)


def _steps(run_dir: str | Path) -> dict[int, Path]:
    """Complete checkpoints by step; where a crash interrupted a replacement, the one that was to be replaced counts."""
    named = sorted(_folders(run_dir), key=lambda path: path.suffix != REPLACED)
    return {int(path.stem.removeprefix("step_")): path for path in named if damage(path) is None}


def _folders(run_dir: str | Path) -> list[Path]:
    return [path for path in Path(run_dir).glob("checkpoints/step_*") if path.suffix != DRAFT]


def damaged_checkpoints(run_dir: str | Path) -> dict[Path, str]:
    """The folders of checkpoints that have lost data since they were written, and what."""
    found = {path: damage(path) for path in sorted(_folders(run_dir))}
    return {path: lost for path, lost in found.items() if lost is not None}


def save_checkpoint(
    trainer: "TrainedModel",
    run_dir: str | Path,
    step: int,
    keep: int,
    states: Mapping[str, Any] | None = None,
    critic: "TrainedModel | None" = None,
) -> None:
    """Save on all ranks. The folder gets its name only when it is complete.

    Args:
        trainer: model and optimizer.
        run_dir: the run's folder.
        step: RL steps done.
        keep: newest checkpoints to keep; older ones are removed.
        states: of the run's parts (see `Stateful`) by name, which `load_state` returns; those of rank 0 count.
        critic: the critic's model and optimizer.
    """
    folder = checkpoint_folder(run_dir, step)
    contents = _sharded_state(trainer, loading=False)
    # Learning rate, data order and sampling seeds are functions of these numbers; nothing else carries over.
    contents["state"] = {"step": step, "updates": trainer.updates}
    if critic is not None:
        contents[CRITIC] = _critic_state(critic, loading=False)
        contents["state"]["critic_updates"] = critic.updates
    plain = {name: state for name, state in (states or {}).items() if not _has_tensors(state)}
    tensors = {name: state for name, state in (states or {}).items() if name not in plain}
    write_model_folder(contents, trainer.config.model.path, folder, plain, tensors)
    if trainer.runtime.is_driver:
        remove_old_checkpoints(run_dir, keep)
    torch.distributed.barrier()


def remove_old_checkpoints(run_dir: str | Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints; what a crash left unfinished does not count as one."""
    steps = _steps(run_dir)
    for old in sorted(steps)[:-keep]:
        shutil.rmtree(steps[old])


def load_checkpoint(
    trainer: "TrainedModel", run_dir: str | Path, step: int, critic: "TrainedModel | None" = None
) -> None:
    """Restore model and optimizer, and the critic's, in place on all ranks; the layout may differ from the one saved.

    Raises:
        ConfigError: when the checkpoint cannot be read, has no critic although there is one to restore, or when the
            state of a mixture's optimizer does not fit the layout.
    """
    folder = _steps(run_dir)[step]
    if trainer.arch.experts:
        _check_dealing(trainer, folder)
    contents = _sharded_state(trainer, loading=True)
    if critic is not None:
        _check_critic(folder)
        contents[CRITIC] = _critic_state(critic, loading=True)
    contents = _load(contents, folder)
    _restore(trainer, contents)
    trainer.updates = contents["state"]["updates"]
    if critic is not None:
        _restore(critic, contents[CRITIC])
        critic.updates = contents["state"]["critic_updates"]


def saved_states(run_dir: str | Path, step: int) -> list[str]:
    """Names of the parts whose states the checkpoint of `step` holds."""
    return sorted(file.stem for file in (_steps(run_dir)[step] / "driver").glob("*"))


def load_state(run_dir: str | Path, step: int, name: str) -> Any:
    """The state that was saved under that name, tensors on the CPU, or None when the checkpoint has nothing by it.

    Raises:
        ConfigError: when it cannot be read.
    """
    plain = _steps(run_dir)[step] / "driver" / f"{name}.json"
    tensors = plain.with_suffix(".pt")
    file = tensors if tensors.is_file() else plain
    try:
        if tensors.is_file():
            return torch.load(tensors, map_location="cpu", weights_only=True)
        return json.loads(plain.read_text()) if plain.is_file() else None
    except (ValueError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ConfigError(f"{file} cannot be read ({error}); remove it to go on without.") from error


def _has_tensors(state: Any) -> bool:
    if isinstance(state, dict):
        return any(map(_has_tensors, state.values()))
    return any(map(_has_tensors, state)) if isinstance(state, list | tuple) else isinstance(state, torch.Tensor)


def _sharded_state(trainer: "TrainedModel", loading: bool) -> dict[str, Any]:
    _allocate_adam_state(trainer)
    if not loading:
        _count_padding_between_parameters(trainer)
    model = trainer.model.sharded_state_dict()
    optimizer = trainer.optimizer.sharded_state_dict(model, is_loading=loading, metadata=OPTIMIZER_FORMAT)
    return {"model": model, "optimizer": optimizer}


def _critic_state(critic: "TrainedModel", loading: bool) -> dict[str, Any]:
    """The same under names of its own, which the two models otherwise share."""
    state = _sharded_state(critic, loading)
    add_prefix_for_sharding(state, f"{CRITIC}.")
    return state


def _restore(trainer: "TrainedModel", contents: dict[str, Any]) -> None:
    trainer.model.load_state_dict(contents["model"])
    trainer.optimizer.load_state_dict(contents["optimizer"])
    _unshare_steps(trainer)


def _check_critic(folder: Path) -> None:
    state = _load({}, folder)["state"]
    if "critic_updates" not in state:
        raise ConfigError(
            f"the checkpoint {folder} has no critic, which algorithm.name needs; choose another run_dir, and that "
            "folder as model.path to start from its weights."
        )


def _count_padding_between_parameters(trainer: "TrainedModel") -> None:
    """Make megatron-core save the ends of its buffers.

    It aligns parameters within a buffer but leaves that padding out of `numel_unpadded`, where saving cuts the buffer
    off: the last parameters would come back as zeros.
    """
    for buffer in trainer.ddp.buffers + trainer.ddp.expert_parallel_buffers:
        buffer.numel_unpadded = buffer.numel
        for bucket in buffer.buckets:
            bucket.numel_unpadded = bucket.grad_data.numel()


def _torch_adams(trainer: "TrainedModel") -> list[torch.optim.Optimizer]:
    inner = [optimizer.optimizer for optimizer in trainer.optimizer.chained_optimizers]
    return [adam for adam in inner if isinstance(adam, torch.optim.Adam | torch.optim.AdamW)]


def _allocate_adam_state(trainer: "TrainedModel") -> None:
    """Adam has no state before its first step, and megatron-core can only save and load state that is there."""
    for optimizer in trainer.optimizer.chained_optimizers:
        optimizer.init_state_fn(optimizer.optimizer, optimizer.config)
    for adam in _torch_adams(trainer):
        for state in adam.state.values():
            state.setdefault("step", torch.tensor(0.0))


def _unshare_steps(trainer: "TrainedModel") -> None:
    """megatron-core gives all parameters one `step` tensor, which Adam would then count up once per parameter."""
    for adam in _torch_adams(trainer):
        for state in adam.state.values():
            state["step"] = state["step"].clone()


def _check_dealing(trainer: "TrainedModel", folder: Path) -> None:
    """megatron-core has an optimizer of their own for experts that are dealt to ranks, and none for others."""
    names = _read(folder, dist_checkpointing.load_tensors_metadata)
    were_dealt = any(name.startswith("chained_1.") for name in names)
    if were_dealt != (len(trainer.optimizer.chained_optimizers) > 1):
        saved, needed = ("more than 1", "1") if were_dealt else ("1", "more than 1")
        raise ConfigError(
            f"the checkpoint {folder} was saved with parallel.ep_size {saved}, and its optimizer cannot go on with "
            f"{needed}; set parallel.ep_size as it was, or start a new run with model.path={folder}."
        )
