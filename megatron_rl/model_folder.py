"""Writes a model folder so that it appears at once, complete."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

MODEL_FILES = (".json", ".txt", ".model", ".jinja")
DRAFT, REPLACED = ".tmp", ".old"


@contextlib.contextmanager
def new_model_folder(folder: Path, template: str | Path) -> Iterator[Path]:
    """A draft with the config and tokenizer of the model `template`, which becomes `folder` when the block ends.

    Called on every rank. All may write into the draft; rank 0 makes, names and cleans up the folders. A folder of that
    name is replaced: until the new one has its place it keeps existing, at most for a moment as `<folder>.old`.
    """
    writes = torch.distributed.get_rank() == 0
    draft, replaced = (folder.with_name(folder.name + suffix) for suffix in (DRAFT, REPLACED))
    if writes:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        _copy_model_files(template, draft)
    torch.distributed.barrier()
    yield draft
    torch.distributed.barrier()
    if writes:
        if folder.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            folder.rename(replaced)
        draft.rename(folder)
        shutil.rmtree(replaced, ignore_errors=True)
    torch.distributed.barrier()


def _copy_model_files(template: str | Path, target: Path) -> None:
    """Copy what makes a folder a Hugging Face model, except the weights: config, tokenizer, chat template."""
    for path in Path(template).iterdir():
        if path.is_file() and path.suffix in MODEL_FILES and "safetensors" not in path.name:
            shutil.copy(path, target)
