"""Reading a checkpoint runs no code that somebody has put into it."""

import io
import os
import pickle
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, load, save
from torch.distributed.checkpoint.api import CheckpointException

from megatron_rl.megatron_patches import safe_loading


class Trap:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.file),)


@pytest.fixture(autouse=True)
def restricted(monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, name in (
        (safe_loading.filesystem, "pickle"),
        (safe_loading.default_planner.DefaultLoadPlanner, "load_bytes"),
    ):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # so that it comes back
    safe_loading.install()


def test_a_checkpoint_of_tensors_and_values_is_read(tmp_path: Path) -> None:
    contents = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(3, dtype=torch.bfloat16), "c": {"step": 3, "d": [1]}}
    save(contents, storage_writer=FileSystemWriter(str(tmp_path)), no_dist=True)
    found = {"a": torch.zeros(2, 3), "b": torch.zeros(3, dtype=torch.bfloat16), "c": {"step": 0, "d": [0]}}
    load(found, storage_reader=FileSystemReader(str(tmp_path)), no_dist=True)
    assert torch.equal(found["a"], contents["a"]) and torch.equal(found["b"], contents["b"])
    assert found["c"] == contents["c"]


def test_code_in_the_index_is_not_run(tmp_path: Path) -> None:
    save({"a": torch.ones(2)}, storage_writer=FileSystemWriter(str(tmp_path)), no_dist=True)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises((pickle.UnpicklingError, CheckpointException), match=r"its index holds posix\.mkdir"):
        load({"a": torch.zeros(2)}, storage_reader=FileSystemReader(str(tmp_path)), no_dist=True)
    assert not (tmp_path / "sprung").exists()


def test_code_in_a_value_is_not_run(tmp_path: Path) -> None:
    value = io.BytesIO()
    torch.save(Trap(tmp_path / "sprung"), value)
    value.seek(0)
    planner = safe_loading.default_planner.DefaultLoadPlanner()
    with pytest.raises(pickle.UnpicklingError, match="weights_only|Weights only"):
        planner.load_bytes(None, value)
    assert not (tmp_path / "sprung").exists()
