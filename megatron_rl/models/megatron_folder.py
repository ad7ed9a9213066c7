"""Model folders with weights in Megatron's distributed format."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_rl.config import ConfigError
from megatron_rl.config.hub import local_folder
from megatron_rl.megatron_patches import checkpointing
from megatron_rl.models.manifest import write_manifest
from megatron_rl.models.model_folder import new_model_folder

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel


def load_megatron_weights(model: "GPTModel", folder: str | Path) -> None:
    """Restore the weights alone from a checkpoint or converted folder, on all ranks.

    Raises:
        ConfigError: when it cannot be read.
    """
    contents = _load({"model": model.sharded_state_dict()}, local_folder(folder))
    model.load_state_dict(contents["model"])


def write_model_folder(
    contents: dict[str, Any],
    template: str | Path,
    folder: Path,
    driver: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Any] | None = None,
) -> None:
    """Write a sharded state dict to `folder/megatron`, with config and tokenizer copied from `template`.

    Rank 0's `driver` values go to `folder/driver/<name>.json`, its `tensors` to `folder/driver/<name>.pt`.
    """
    checkpointing.install()
    with new_model_folder(folder, template, _weights_dtype(contents)) as draft:
        (draft / "megatron").mkdir(exist_ok=True)
        dist_checkpointing.save(contents, str(draft / "megatron"))
        if (driver or tensors) and torch.distributed.get_rank() == 0:
            (draft / "driver").mkdir()
            for name, value in (driver or {}).items():
                (draft / "driver" / f"{name}.json").write_text(json.dumps(value))
            for name, value in (tensors or {}).items():
                torch.save(value, draft / "driver" / f"{name}.pt")
        if torch.distributed.get_rank() == 0:
            write_manifest(draft)


def _weights_dtype(contents: Mapping[str, Any]) -> torch.dtype | None:
    """Of the weights that this rank has in a sharded state dict."""
    tensors = (value for value in contents.get("model", {}).values() if isinstance(value, ShardedTensor))
    return next((tensor.dtype for tensor in tensors if tensor.dtype.is_floating_point), None)


def _load(contents: dict[str, Any], folder: Path) -> dict[str, Any]:
    checkpointing.install()
    return _read(folder, lambda path: dist_checkpointing.load(contents, path))


def _read(folder: Path, how: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    try:
        return how(str(folder / "megatron"))
    except Exception as error:
        raise ConfigError(
            f"the checkpoint {folder} cannot be read ({error}); remove it to use an older one."
        ) from error
