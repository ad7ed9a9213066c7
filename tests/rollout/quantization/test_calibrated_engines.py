"""Int8 engines that smooth: what they compute, and that it is nearer to the model."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_rl.calibration.profile import profile
from megatron_rl.calibration.profile_file import read_profile, setup
from rollout.quantization.int8 import reference_linear
from tests.capabilities import require_int8
from tests.rollout.helpers import VOCAB_LIMIT, generate, make_config, make_requests, open_arguments, open_engines
from tests.rollout.quantization.test_quantization import load_partly, products
from tests.rollout.tiny_models import make_model, plant_outliers

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plant_outliers(make_model(tmp_path_factory.mktemp("planted")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("calibrated")


@pytest.fixture(scope="module")
def calibrated(planted: Path, folder: Path) -> Path:
    """A quantization file for `planted`, with one layer clipped by hand."""
    require_int8()
    profile(make_config(folder, planted), folder / "profile.safetensors", prompts=16, rollouts=None, quantized=None)
    setup(folder / "profile.safetensors", folder / "int8.yaml", 0.1, [])
    text = (folder / "int8.yaml").read_text()
    place = text.index("clip:", text.index("model.layers.1.self_attn.o_proj"))
    (folder / "int8.yaml").write_text(text[:place] + "clip: 0.9" + text[text.index("\n", place) :])
    return folder / "int8.yaml"


@pytest.fixture(scope="module")
def engines(planted: Path, calibrated: Path) -> Iterator[tuple[Any, Any]]:
    arguments = [
        open_arguments(planted, planted, quantization="int8"),
        open_arguments(planted, planted, quantization="int8", quantization_profile=str(calibrated)),
    ]
    with open_engines(arguments) as started:
        yield tuple(started)


def matrix_of(weights: dict[str, Tensor], name: str) -> Tensor:
    parent, _, own = name.rpartition(".")
    return torch.cat([weights[f"{parent}.{part}.weight"] for part in FUSED.get(own, [own])])


def expected_products(weights: dict[str, Tensor], names: list[str], folder: Path) -> dict[str, Tensor]:
    """What `products` has to return, from the files alone."""
    layers, smoothing = read_profile(folder / "profile.safetensors")
    torch.manual_seed(0)
    expected = {}
    for name in names:
        matrix = matrix_of(weights, name)
        clip = 0.9 if name == "model.layers.1.self_attn.o_proj" else layers[name].clip
        expected[name] = reference_linear(torch.randn(3, matrix.shape[1]), matrix, None, smoothing[name], clip)
    return expected


@pytest.mark.slow
def test_layers_multiply_smoothed_and_clipped_also_after_new_weights(
    engines: tuple, planted: Path, folder: Path
) -> None:
    weights = load_file(planted / "model.safetensors")
    other = {name: 0.5 * t + 0.1 * torch.randn_like(t) for name, t in weights.items() if name.endswith("_proj.weight")}
    for current in (weights, other, weights):
        ray.get(engines[1].apply.remote(load_partly, {name: current[name] for name in other}))
        found = ray.get(engines[1].apply.remote(products))
        expected = expected_products(current, list(found), folder)
        assert all(torch.equal(found[name], expected[name]) for name in found)
    rounding = ray.get(engines[1].weight_rounding.remote())[0]
    assert rounding["model.layers.1.self_attn.o_proj"].clipped > 0


def gap(engine: Any, planted: Path) -> float:
    """Mean absolute difference of an engine's log-probs to those of `transformers`, nats."""
    reference = AutoModelForCausalLM.from_pretrained(planted, dtype=torch.float32)
    differences = []
    for rollout in generate(engine, make_requests(12)):
        with torch.no_grad():
            logits = reference(torch.tensor([rollout.prompt_ids + rollout.token_ids])).logits[0]
        logits[:, VOCAB_LIMIT:] = -torch.inf
        tokens = torch.tensor(rollout.token_ids)
        expected = logits[len(rollout.prompt_ids) - 1 : -1].log_softmax(-1)[torch.arange(len(tokens)), tokens]
        differences.append((torch.tensor(rollout.logprobs) - expected).abs())
    return torch.cat(differences).mean().item()


@pytest.mark.slow
def test_smoothing_brings_the_engine_nearer_to_the_model(engines: tuple, planted: Path) -> None:
    plain, smoothed = (gap(engine, planted) for engine in engines)
    assert smoothed < plain / 2


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"tp_size": 2}, {"vllm": {"enforce_eager": False}}], ids=["tp2", "compiled"])
def test_split_and_compiled_engines_smooth_too(
    engines: tuple, planted: Path, calibrated: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    own = open_arguments(tmp_path, planted, quantization="int8", quantization_profile=str(calibrated), **options)
    with open_engines([own]) as (engine,):
        assert gap(engine, planted) < gap(engines[0], planted) / 2
