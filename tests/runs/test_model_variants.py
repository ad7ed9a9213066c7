"""Engine, trainer and transformers agree on every variant of a model that is supported, and a wrong one is noticed."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.drills import metrics, model_experiment
from tests.examples.test_model_family import make
from tests.hf_models import YARN_ROPE
from tests.rollout.tiny_models import make_model
from tests.runs.test_train import run, start

VARIANTS: dict[str, dict[str, object]] = {
    "llama with all biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama with biases of attention": {"model_type": "llama", "attention_bias": True},
    "qwen2 with a window": {
        "model_type": "qwen2", "hidden_size": 128, "use_sliding_window": True, "sliding_window": 8,
        "max_window_layers": 0,
    },
    "qwen3 with yarn": {"rope_parameters": YARN_ROPE, "max_position_embeddings": 128},
    "null heads": {"model_type": "llama", "num_key_value_heads": 4},
}  # fmt: skip


def differences(log: str) -> dict[str, float]:
    """Mean differences from transformers that the run reported, in nats."""
    line = next(line for line in log.splitlines() if line.startswith("log-probs beside transformers"))
    return {name: float(value) for name, value in (part.split() for part in line.partition(": ")[2].split(", "))}


def check(folder: Path, model: Path) -> None:
    run(model_experiment(folder, model))
    found = differences((folder / "log.txt").read_text())
    assert found.keys() == {"trainer", "engine"}
    assert max(found.values()) < 1e-4
    for step in (1, 2):  # the second one with weights that the first has changed
        assert metrics(folder / "run")[step]["logprob_gap/mean"] < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_engine_and_trainer_agree_with_transformers(variant: str, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", seed=3, **VARIANTS[variant])
    if variant == "null heads":
        hf = json.loads((model / "config.json").read_text()) | {"num_key_value_heads": None}
        (model / "config.json").write_text(json.dumps(hf))
    check(tmp_path, model)


@pytest.mark.slow
def test_a_model_stored_in_fp8_is_trained_as_the_numbers_it_means(tmp_path: Path) -> None:
    """Beside a plain model with the same numbers: the same log-probs of the same tokens."""
    model = make_model(tmp_path / "model", seed=3)
    tensors, plain = load_file(model / "model.safetensors"), {}
    for name, tensor in list(tensors.items()):
        plain[name] = tensor
        if "_proj" in name:
            scale = (
                (tensor.float().abs().amax() / 400).reshape(1, 1).expand(*(-(-size // 128) for size in tensor.shape))
            )
            small = (tensor.float() / scale[0, 0]).to(torch.float8_e4m3fn)
            tensors[name], tensors[name + "_scale_inv"] = small, scale.contiguous()
            plain[name] = (small.float() * scale[0, 0]).to(tensor.dtype)
    save_file(plain, model / "model.safetensors", metadata={"format": "pt"})
    run(model_experiment(tmp_path, model), f"run_dir={tmp_path / 'plain'}")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    hf = json.loads((model / "config.json").read_text())
    hf["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (model / "config.json").write_text(json.dumps(hf))
    run(tmp_path / "experiment.yaml")
    assert "its files hold quantized weights" in (tmp_path / "log.txt").read_text()
    stored, as_numbers = metrics(tmp_path / "run"), metrics(tmp_path / "plain")
    for step in (1, 2):
        for name in ("reward/mean", "loss/policy", "optim/grad_norm", "rollout/length_mean"):
            if name in as_numbers[step]:
                assert stored[step][name] == pytest.approx(as_numbers[step][name], rel=1e-5), name
        assert stored[step]["logprob_gap/mean"] < 1e-4
    assert "quantization_config" not in json.loads((tmp_path / "run" / "hf" / "config.json").read_text())


@pytest.mark.slow
def test_a_trainer_that_computes_another_model_does_not_start(tmp_path: Path) -> None:
    model = make("MIXTRAL", tmp_path / "model", head_dim=32)

    process = start(model_experiment(tmp_path, model, family="tests.runs.wrong_family:NOT_NORMALIZED"))
    assert process.wait(timeout=300) != 0
    last = (tmp_path / "log.txt").read_text().strip().splitlines()[-1]
    assert "the trainer does not compute model.path=" in last
    assert "set model.check=off" in last
