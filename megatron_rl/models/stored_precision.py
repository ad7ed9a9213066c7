"""The precision in which a model folder holds its weights: what its files have, and what its `config.json` says."""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from megatron.core.dist_checkpointing import load_tensors_metadata

from megatron_rl.config.hub import MODEL_PATH, local_folder
from megatron_rl.models.stored_tensors import FLOATS, find_tensors, has_megatron_weights

HALVES = (torch.bfloat16, torch.float16)
EMBEDDING = "embedding.word_embeddings.weight"
"""Of megatron-core's names; all of a model's weights have one precision there."""


def name_of(dtype: torch.dtype) -> str:
    """As `config.json` has it, such as `float32`."""
    return str(dtype).removeprefix("torch.")


def stored_precisions(model: str | Path, names: Iterable[str] | None = None) -> set[torch.dtype]:
    """The floating types of the weights in a model folder, of either format.

    Args:
        model: a folder, or a name on the hub.
        names: tensors of the Hugging Face format that count; None: all that are floating numbers.
    """
    folder = local_folder(model)
    if has_megatron_weights(folder):
        return {load_tensors_metadata(str(folder / "megatron"))[EMBEDDING].dtype}
    stored = find_tensors(folder, MODEL_PATH)
    chosen = stored.keys() if names is None else stored.keys() & set(names)
    return {FLOATS[stored[name].dtype] for name in chosen if stored[name].dtype in FLOATS}


def common_precision(found: set[torch.dtype]) -> torch.dtype:
    """The narrowest type that all of these can be written in; at most float32, and bfloat16 for nothing."""
    if len(found) == 1 and found <= {*HALVES}:
        return next(iter(found))
    return torch.float32 if found else torch.bfloat16


def said_precision(folder: Path) -> str | None:
    """What `config.json` says; None: nothing."""
    content = json.loads((folder / "config.json").read_text())
    said = content.get("dtype") or content.get("torch_dtype")
    return None if said is None else str(said)


def say_precision(folder: Path, dtype: torch.dtype) -> None:
    """Make `config.json` say the precision of the weights beside it; a file that does already stays as it is."""
    file = folder / "config.json"
    if not file.is_file() or said_precision(folder) == name_of(dtype):
        return
    content = json.loads(file.read_text())
    keys = [key for key in ("dtype", "torch_dtype") if key in content] or ["dtype"]
    file.write_text(json.dumps(content | dict.fromkeys(keys, name_of(dtype)), indent=2) + "\n")
