"""Smoothing and clipping: how they are chosen, stored and read again."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from megatron_rl.calibration.profile import profile
from megatron_rl.calibration.profile_file import read_profile, setup
from megatron_rl.calibration.smoothquant import Settings, from_checkpoint, layer_name, losses, search, smoothing_vector
from megatron_rl.config import Config, ConfigError
from megatron_rl.config.model_fit import check_layout
from megatron_rl.config.quantization import read_quantization_file
from megatron_rl.trainer.weight_sync import rounding_metrics
from rollout.quantization.calibration_file import Calibration
from rollout.quantization.int8 import Rounding, quantized
from tests.rollout.tiny_models import make_model, plant_outliers

LAYERS = ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"]
NAMES = [f"model.layers.{i}.{name}" for i in (0, 1) for name in LAYERS]
PLAIN = Settings(None, 1.0, None)


def outliers(rows: int = 200, inputs: int = 64) -> torch.Tensor:
    torch.manual_seed(0)
    x = torch.randn(rows, inputs)
    x[:, 7] *= 100
    return x


def test_the_smoothing_is_the_papers_up_to_a_factor() -> None:
    torch.manual_seed(0)
    x, w = torch.rand(10) + 0.1, torch.rand(10) + 0.1
    ratio = smoothing_vector(x, w, 0.7) / (x**0.7 / w**0.3)
    torch.testing.assert_close(ratio, ratio[:1].expand(10))
    assert smoothing_vector(x, w, 0.7).log().mean().abs() < 1e-5


def test_inputs_that_are_never_used_are_not_smoothed() -> None:
    vector = smoothing_vector(torch.tensor([0.0, 1.0, 2.0, 4.0]), torch.tensor([1.0, 0.0, 2.0, 2.0]), 0.5)
    assert vector[:2].tolist() == [1, 1] and vector.isfinite().all()


def test_the_search_finds_settings_that_save_a_layer_with_an_outlier_channel() -> None:
    x, weight = outliers(), torch.randn(48, 64)
    weight[:, 7] /= 100  # all channels matter the same
    chosen = search(x[:100], weight, x.abs().amax(0))
    assert chosen.alpha is not None
    plain, smoothed = (losses(x[100:], weight, settings) for settings in (PLAIN, chosen))
    assert smoothed.error < plain.error / 5 and smoothed.error < 0.03
    assert plain.flushed > 10 * smoothed.flushed


def test_the_search_clips_only_where_that_helps() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(100, 4096), torch.randn(8, 4096)
    weight[:, 0], x[:, 0] = 6, 0.0  # the largest weight of every channel meets nothing
    clipped = search(x, weight, x.abs().amax(0))
    assert clipped.clip < 1 and losses(x, weight, clipped).error < losses(x, weight, PLAIN).error
    weight[:, 0], x[:, 0] = 40, 3.0
    assert search(x, weight, x.abs().amax(0)).clip == 1


def test_a_checkpoint_tells_its_smoothing_and_clipping() -> None:
    torch.manual_seed(0)
    weight, norm = torch.randn(300, 64), torch.rand(64) + 0.5
    smoothing = torch.rand(64) * 3 + 0.2
    row_factors = torch.rand(300) + 0.5  # of a projection that feeds a smoothed one
    for clip in (1.0, 0.8):
        levels, scales = quantized(weight * row_factors[:, None], smoothing, clip)
        exact = from_checkpoint(weight, levels.to(torch.int8), scales, (norm, norm / smoothing))
        torch.testing.assert_close(exact.smoothing, smoothing)
        assert exact.clip == clip
    levels, scales = quantized(weight, smoothing)
    by_columns = from_checkpoint(weight, levels.to(torch.int8), scales, None)
    torch.testing.assert_close(by_columns.smoothing, smoothing, rtol=0.02, atol=0)
    levels, scales = quantized(weight)
    assert from_checkpoint(weight, levels.to(torch.int8), scales, None) == PLAIN
    assert from_checkpoint(weight, levels.to(torch.int8), scales, (norm, norm)) == PLAIN


def test_projections_belong_to_vllms_layers() -> None:
    assert layer_name("model.layers.3.self_attn.k_proj") == "model.layers.3.self_attn.qkv_proj"
    assert layer_name("model.layers.3.mlp.up_proj") == "model.layers.3.mlp.gate_up_proj"
    assert layer_name("model.layers.3.mlp.down_proj") == "model.layers.3.mlp.down_proj"


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plant_outliers(make_model(tmp_path_factory.mktemp("planted")))


def config_of(model: Path, **rollout: object) -> Config:
    return Config.model_validate(
        {
            "model": {"path": str(model), "precision": "fp32"},
            "data": {"max_prompt_tokens": 64},
            "rollout": {"max_tokens": 64, **rollout},
            "run_dir": str(model / "run"),
        }
    )


@pytest.fixture(scope="module")
def profiled(planted: Path) -> Path:
    file = planted / "run" / "profile.safetensors"
    # As in a config that already names the file which is still to be made.
    config = config_of(planted, quantization="int8", quantization_profile="int8.yaml")
    profile(config, file, prompts=16, rollouts=None, quantized=None)
    return file


def test_a_profile_smooths_the_layers_that_suffer(profiled: Path) -> None:
    layers, smoothing = read_profile(profiled)
    assert list(layers) == NAMES
    for name, layer in layers.items():
        assert layer.chosen.error < 0.05 and layer.chosen.error < layer.plain.error / 2, name
        assert layer.alpha is not None and smoothing[name].isfinite().all()
    stored = load_file(profiled)
    assert {name.rpartition(".")[2] for name in stored} == {"activation_max", "weight_max", "smoothing"}


def test_rollouts_take_the_place_of_prompts(planted: Path, tmp_path: Path) -> None:
    rollouts = tmp_path / "rollouts.jsonl"
    rollouts.write_text(
        "".join(json.dumps({"prompt_ids": [5, 6, 7 + i], "token_ids": [8, 9]}) + "\n" for i in range(3))
    )
    profile(config_of(planted), tmp_path / "p.safetensors", prompts=2, rollouts=rollouts, quantized=None)
    assert list(read_profile(tmp_path / "p.safetensors")[0]) == NAMES


def test_setup_writes_what_engines_read(profiled: Path, tmp_path: Path) -> None:
    setup(profiled, tmp_path / "int8.yaml", 0.1, ["last:1"])
    file = read_quantization_file(tmp_path / "int8.yaml")
    assert file.quantization == "int8" and file.skip == ["last:1"] and list(file.layers) == NAMES
    _, smoothing = read_profile(profiled)
    calibration = Calibration(str(tmp_path / "int8.yaml"))
    for name in NAMES:
        layer = calibration.of_layer(name)
        assert layer.skip is None and layer.clip == file.layers[name].clip
        assert torch.equal(layer.smoothing, smoothing[name])


def test_layers_beyond_the_bound_keep_their_precision(
    profiled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layers, _ = read_profile(profiled)
    errors = sorted(layer.chosen.error for layer in layers.values())
    bound = (errors[2] + errors[3]) / 2
    setup(profiled, tmp_path / "int8.yaml", bound, [])
    file = read_quantization_file(tmp_path / "int8.yaml")
    skipped = {name for name, layer in file.layers.items() if layer.skip is not None}
    assert skipped == {name for name, layer in layers.items() if layer.chosen.error > bound} and len(skipped) == 5
    printed = capsys.readouterr().out
    assert all(f"{name} stays in high precision: its output's relative error" in printed for name in skipped)


def test_a_tensor_parallel_rank_takes_its_part_of_the_inputs(profiled: Path, tmp_path: Path) -> None:
    setup(profiled, tmp_path / "int8.yaml", 1.0, [])
    down = Calibration(str(tmp_path / "int8.yaml")).of_layer(NAMES[3])
    assert down.smoothing is not None

    def part(size: int, own: int, rank: int) -> torch.Tensor | None:
        return down.part_of(
            SimpleNamespace(input_size=size, input_size_per_partition=own, tp_rank=rank, weight=torch.empty(0))
        )

    assert torch.equal(part(96, 48, 1), down.smoothing[48:])  # row parallel: the inputs are split
    assert torch.equal(part(96, 96, 1), down.smoothing)  # column parallel: they are not
    with pytest.raises(ConfigError, match="smooths 96 inputs of model.layers.0.mlp.down_proj, which has 128"):
        part(128, 64, 0)


def test_files_that_do_not_fit_are_one_sentence(profiled: Path, planted: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="none.safetensors is no profile"):
        setup(tmp_path / "none.safetensors", tmp_path / "int8.yaml", 0.1, [])
    with pytest.raises(ConfigError, match="model.safetensors is no profile"):
        setup(planted / "model.safetensors", tmp_path / "int8.yaml", 0.1, [])
    with pytest.raises(ConfigError, match="is in a model's folder"):
        setup(profiled, planted / "int8.yaml", 0.1, [])
    with pytest.raises(ConfigError, match="is in a model's folder"):
        profile(config_of(planted), planted / "p.safetensors", prompts=2, rollouts=None, quantized=None)
    with pytest.raises(ConfigError, match="in place of the profile"):
        setup(profiled, profiled.with_suffix(".yaml"), 0.1, [])
    setup(profiled, tmp_path / "int8.yaml", 0.1, [])
    with pytest.raises(ConfigError, match=r"has no layer model.layers.9.mlp.down_proj; make it anew"):
        Calibration(str(tmp_path / "int8.yaml")).of_layer("model.layers.9.mlp.down_proj")
    (tmp_path / "int8.safetensors").unlink()
    with pytest.raises(ConfigError, match="keep the two files together"):
        Calibration(str(tmp_path / "int8.yaml"))


def test_the_config_has_to_agree_with_the_file(planted: Path, tmp_path: Path) -> None:
    hf = json.loads((planted / "config.json").read_text())
    path = tmp_path / "fp8.yaml"
    path.write_text(yaml.safe_dump({"quantization": "fp8"}))
    with pytest.raises(ConfigError, match=r"quantization_profile=.* is for fp8, but rollout.quantization=int8"):
        check_layout(config_of(planted, quantization="int8", quantization_profile=str(path)), hf)
    with pytest.raises(ConfigError, match="cannot be read"):
        check_layout(config_of(planted, quantization="int8", quantization_profile=str(tmp_path / "none")), hf)
    with pytest.raises(ValueError, match="quantization_profile has no effect with rollout.quantization=none"):
        config_of(planted, quantization_profile=str(path))


def quantized_checkpoint(model: Path, folder: Path, smoothing: dict[str, torch.Tensor]) -> Path:
    """As llm-compressor writes W8A8 with SmoothQuant: the inverse smoothing in the norm, int8 weights with scales."""
    weights = load_file(model / "model.safetensors")
    stored = dict(weights)
    for i in (0, 1):
        block = f"model.layers.{i}."
        groups = {"input_layernorm": ["self_attn.q", "self_attn.k", "self_attn.v"]}
        groups["post_attention_layernorm"] = ["mlp.gate", "mlp.up"]
        for norm, parts in groups.items():
            vector = smoothing[f"{block}{'self_attn.qkv' if norm == 'input_layernorm' else 'mlp.gate_up'}_proj"]
            stored[f"{block}{norm}.weight"] = weights[f"{block}{norm}.weight"] / vector
            for part in parts:
                stored[f"{block}{part}_proj.weight"] = weights[f"{block}{part}_proj.weight"] * vector
    for name in list(stored):
        if name.endswith("_proj.weight") and name != "model.layers.1.mlp.down_proj.weight":
            levels, scales = quantized(stored[name])
            stored[name] = levels.to(torch.int8)
            stored[f"{name}_scale"] = scales[:, None].bfloat16()
    folder.mkdir()
    save_file(stored, folder / "model.safetensors")
    return folder


def test_a_quantized_checkpoint_gives_its_settings(planted: Path, profiled: Path, tmp_path: Path) -> None:
    _, smoothing = read_profile(profiled)
    checkpoint = quantized_checkpoint(planted, tmp_path / "w8a8", smoothing)
    output = tmp_path / "p.safetensors"
    profile(config_of(planted), output, prompts=16, rollouts=None, quantized=checkpoint)
    layers, found = read_profile(output)
    for name in NAMES:
        if "qkv" in name or "gate_up" in name:
            torch.testing.assert_close(found[name], smoothing[name])
            assert layers[name].chosen.error < layers[name].plain.error / 2
        else:
            assert name not in found and layers[name].chosen == layers[name].plain
    setup(output, tmp_path / "int8.yaml", 10.0, [])
    kept = {name for name, layer in read_quantization_file(tmp_path / "int8.yaml").layers.items() if layer.skip}
    assert kept == {"model.layers.1.mlp.down_proj"}


def test_a_checkpoint_of_another_kind_is_one_sentence(planted: Path, tmp_path: Path) -> None:
    def compare(folder: Path) -> None:
        profile(config_of(planted), tmp_path / "p.safetensors", prompts=2, rollouts=None, quantized=folder)

    with pytest.raises(ConfigError, match="has no weight_scale tensors; give a W8A8 checkpoint"):
        compare(planted)
    with pytest.raises(ConfigError, match=r"--quantized .* has no \*.safetensors"):
        compare(tmp_path)
    smoothing = {name: torch.ones(64) for name in NAMES}
    folder = quantized_checkpoint(planted, tmp_path / "w8a8", smoothing)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight_scale"] = torch.ones(1)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ConfigError, match="mlp.down_proj is not int8 with a scale per output channel"):
        compare(folder)


def test_metrics_name_the_worst_layer_of_all_engines(caplog: pytest.LogCaptureFixture) -> None:
    parts = [{"a": Rounding(0.01, 0.0), "b": Rounding(0.02, 0.1)}, {"a": Rounding(0.01, 0.0), "b": Rounding(0.24, 0.3)}]
    metrics = rounding_metrics(parts, 0.25)
    assert metrics == pytest.approx(
        {
            "quantization/weight_error_mean": 0.07,
            "quantization/weight_error_max": 0.24,
            "quantization/clipped_fraction": 0.1,
        }
    )
    assert not caplog.records
    rounding_metrics(parts, 0.1)
    assert "b loses 24 % of its weights' norm in int8, more than rollout.quantization_max_error=0.1" in caplog.text
    assert rounding_metrics([{}], 0.1) == {}
