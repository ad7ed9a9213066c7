"""`megatron-rl convert`: to Megatron's format and back."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.hf_models import make_mixture, make_models
from tests.launching import ROOT


def convert(to: str, source: Path, output: Path) -> None:
    command = [sys.executable, "-m", "megatron_rl.cli", "convert", "--to", to, str(source), str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "Warning" not in done.stderr, done.stderr


def assert_survives(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "back"
    output.mkdir()  # an empty folder is as good as none
    convert("megatron", model, tmp_path / "megatron")
    convert("hf", tmp_path / "megatron", output)
    expected, found = (load_file(folder / "model.safetensors") for folder in (model, output))
    assert sorted(found) == sorted(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name
    AutoModelForCausalLM.from_pretrained(output)


def test_a_model_comes_back_with_the_same_bits(tmp_path: Path) -> None:
    assert_survives(make_models(tmp_path)["qwen3"], tmp_path)


@pytest.mark.slow
def test_a_mixture_in_bf16_comes_back_with_the_same_bits(tmp_path: Path) -> None:
    folder = make_mixture(tmp_path / "mixture")
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    assert_survives(folder, tmp_path)
