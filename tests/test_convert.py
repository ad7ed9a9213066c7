"""`megatron-rl convert`: to Megatron's format and back."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.hf_models import make_mixture, make_models
from tests.launching import ROOT


def convert(to: str, source: Path, output: Path) -> str:
    command = [sys.executable, "-m", "megatron_rl.cli", "convert", "--to", to, str(source), str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "Warning" not in done.stderr, done.stderr
    return " ".join((done.stdout + done.stderr).split())


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


def halved(tmp_path: Path, dtype: torch.dtype) -> Path:
    """A model whose weights need all the bits of `dtype`, and whose config says so."""
    folder = make_models(tmp_path)["qwen3"]
    AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).save_pretrained(folder)
    assert said(folder) == str(dtype).removeprefix("torch.")
    return folder


def said(folder: Path) -> str:
    return json.loads((folder / "config.json").read_text())["dtype"]


def test_float16_comes_back_as_float16(tmp_path: Path) -> None:
    folder = halved(tmp_path, torch.float16)
    assert_survives(folder, tmp_path)
    assert said(tmp_path / "megatron") == said(tmp_path / "back") == "float16"


@pytest.mark.slow
def test_tensors_of_several_precisions_keep_all_bits_and_a_line_says_how(tmp_path: Path) -> None:
    folder = halved(tmp_path, torch.bfloat16)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], 1 + 2**-20, dtype=torch.float32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    shown = convert("megatron", folder, tmp_path / "megatron")
    assert "its weights are of bfloat16 and float32: all are written as float32" in shown
    assert "its config.json says bfloat16, but the weights are written as float32" in shown
    convert("hf", tmp_path / "megatron", tmp_path / "back")
    assert said(tmp_path / "back") == "float32"
    for name, value in load_file(tmp_path / "back" / "model.safetensors").items():
        assert value.dtype == torch.float32 and torch.equal(value, tensors[name].float()), name
