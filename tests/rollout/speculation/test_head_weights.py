"""New weights of the head on their way to the engines: nothing is lost, wrong ones are named, any node is reached."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from drafter.eagle.head_files import save_head
from rollout.speculation.head_weights import check_head, largest_head, pack_head, unpack_head
from tests.launching import ROOT
from tests.rollout.speculation.test_eagle import random_head


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_arrive_as_they_are_in_the_engines_dtype(dtype: torch.dtype) -> None:
    tensors = {"fc.weight": torch.randn(6, 4).T, "norm.weight": torch.randn(3), "d2t": torch.arange(5)}
    packed = pack_head(tensors, dtype)
    for _, values in packed.values():
        values.flags.writeable = False  # as in the object store
    arrived = dict(unpack_head(packed))
    assert arrived.keys() == tensors.keys()
    assert torch.equal(arrived["d2t"], tensors["d2t"])
    for name in ("fc.weight", "norm.weight"):
        assert arrived[name].dtype == dtype and torch.equal(arrived[name], tensors[name].to(dtype))


def test_tensors_of_another_head_are_named(tmp_path: Path) -> None:
    tensors = {"fc.weight": torch.zeros(4, 12), "norm.weight": torch.zeros(4)}
    save_file(tensors, tmp_path / "model.safetensors")
    check_head(tensors, tmp_path)
    with pytest.raises(ValueError, match=r"1 tensors are not .* fc\.weight: \[4, 8\] instead of \[4, 12\]"):
        check_head(tensors | {"fc.weight": torch.zeros(4, 8)}, tmp_path)
    with pytest.raises(ValueError, match=r"norm\.weight: missing instead of \[4\]"):
        check_head({"fc.weight": torch.zeros(4, 12)}, tmp_path)
    with pytest.raises(ValueError, match=r"extra: \[1\] instead of nothing"):
        check_head(tensors | {"extra": torch.zeros(1)}, tmp_path)
    assert largest_head(tmp_path) >= 2 * (4 * 12 + 4) * 4


@pytest.mark.slow
def test_a_head_reaches_an_engine_on_another_node(other_model: Path, tmp_path: Path) -> None:
    save_head(random_head(other_model, 0), tmp_path / "head")
    command = [
        sys.executable,
        "-m",
        "tests.rollout.speculation.two_nodes_worker",
        str(other_model),
        str(tmp_path / "head"),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    environment.pop("RAY_ADDRESS", None)
    done = subprocess.run(
        [*command, str(tmp_path)], capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
