"""Writes a model folder so that it appears at once, complete."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch
from torch.distributed.checkpoint.api import CheckpointException

from megatron_rl.config.hub import local_folder
from megatron_rl.distributed.device import shared_store
from megatron_rl.models.stored_precision import say_precision

MODEL_FILES = (".json", ".txt", ".model", ".jinja")
DRAFT, REPLACED = ".tmp", ".old"
_PATIENCE = timedelta(seconds=10)
_PROBE_BYTES = 4 * 2**20


@contextlib.contextmanager
def new_model_folder(folder: Path, template: str | Path, dtype: torch.dtype | None = None) -> Iterator[Path]:
    """A draft with the config and tokenizer of the model `template`, which becomes `folder` when the block ends.

    The config says `dtype`, in which the weights are written; None: what the template says.

    Called on every rank. All may write into the draft; rank 0 makes, names and cleans up the folders. A folder of that
    name is replaced: until the new one has its place it keeps existing, at most for a moment as `<folder>.old`.

    Raises:
        RuntimeError: when the block, or the copying, raises: the draft is gone, and what was there before is untouched.
    """
    writes = torch.distributed.get_rank() == 0
    draft, replaced = (folder.with_name(folder.name + suffix) for suffix in (DRAFT, REPLACED))
    try:
        if writes:
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
            _copy_model_files(template, draft)
            if dtype is not None:
                say_precision(draft, dtype)
        torch.distributed.barrier()
        yield draft
    except (Exception, CheckpointException) as error:  # torch derives its own from BaseException
        reason, free = _reason(error, draft), shutil.disk_usage(_existing(folder.parent)).free / 1e9
        if writes:
            shutil.rmtree(draft, ignore_errors=True)
        raise RuntimeError(
            f"{folder} could not be written ({reason}; {free:.2f} GB are free there); what was there before is "
            "untouched: make room, or remove the cause, and start again, which goes on from the newest checkpoint."
        ) from error
    torch.distributed.barrier()
    if writes:
        if folder.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            folder.rename(replaced)
        draft.rename(folder)
        shutil.rmtree(replaced, ignore_errors=True)
    torch.distributed.barrier()


def _existing(folder: Path) -> Path:
    return next(place for place in (folder, *folder.parents) if place.is_dir())


def _write_error(folder: Path) -> str | None:
    """Why nothing can be written there, in the system's words, or None: torch's writers do not say."""
    try:
        with tempfile.NamedTemporaryFile(dir=_existing(folder)) as file:
            file.write(bytes(_PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.strerror
    return None


def _reason(error: BaseException, draft: Path) -> str:
    """Why the draft could not be written: what the disk says, or the error that megatron-core and torch have wrapped.

    Rank 0 alone looks at the disk, before it removes the draft, and tells those that only hear that others failed.
    """
    store, key = shared_store(), f"why/{draft}"
    failures = list(error.failures.values()) if isinstance(error, CheckpointException) else [(error, None)]
    if torch.distributed.get_rank() != 0 and not failures:
        try:
            store.wait([key], _PATIENCE)
            return str(store.get(key).decode())
        except RuntimeError:
            return "rank 0 has not said why"
    first = failures[0][0] if failures else error
    reason = f"{type(first).__name__}: {' '.join(str(first).split())}"
    if torch.distributed.get_rank() == 0:
        reason = _write_error(draft) or reason
        store.set(key, reason)
    return reason


def _copy_model_files(template: str | Path, target: Path) -> None:
    """Copy what makes a folder a Hugging Face model, except the weights: config, tokenizer, chat template."""
    for path in local_folder(template).iterdir():
        if path.is_file() and path.suffix in MODEL_FILES and "safetensors" not in path.name:
            shutil.copy(path, target)
    config = json.loads((target / "config.json").read_text())
    if config.pop("quantization_config", None) is not None:  # weights are written as the numbers they stand for
        (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
