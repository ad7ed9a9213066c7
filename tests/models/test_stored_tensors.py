"""A model is read whole, from the files of its index, and nothing is left over; quantized weights become numbers."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_rl.config import ConfigError
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.hf_mapping import hf_shapes
from megatron_rl.models.stored_tensors import StoredTensors, find_tensors
from tests.hf_models import SHAPE

Tensors = dict[str, torch.Tensor]
UP = "model.layers.1.mlp.up_proj.weight"
WHOLE = (slice(None), slice(None))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=False, **SHAPE)).bfloat16()
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit(folder: Path, change: Callable[[Tensors], object], **config: object) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    hf = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(hf | config))


def opened(folder: Path) -> StoredTensors:
    return StoredTensors(folder, Architecture.from_folder(folder))


def refused(folder: Path, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        opened(folder)


def test_all_tensors_and_parts_of_them_are_read(folder: Path) -> None:
    stored, truth = opened(folder), load_file(folder / "model.safetensors")
    assert truth.keys() == hf_shapes(Architecture.from_folder(folder)).keys()
    for name, tensor in truth.items():
        assert torch.equal(stored.read(name, (slice(None),) * tensor.dim()), tensor)
    assert torch.equal(stored.read(UP, (slice(3, 7), slice(2, 4))), truth[UP][3:7, 2:4])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: t.pop(UP), rf"lacks the tensor {UP}"),
        (lambda t: t.update({UP: t[UP][:5]}), rf"{UP} has shape \[5, 64\], but config.json says \[96, 64\]"),
        (
            lambda t: t.update({"model.layers.0.self_attn.o_proj.bias": torch.ones(64)}),
            "o_proj.bias .* no place",
        ),
        (lambda t: t.update({"model.layers.4.mlp.up_proj.weight": t[UP].clone()}), "model.layers.4.mlp.up_proj.weight"),
        (lambda t: t.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(16)}), "q_norm.weight"),
        (lambda t: t.update({"score.weight": torch.ones(1, 64)}), r"score.weight \(1 in all\)"),
        (lambda t: t.update({UP: t[UP].to(torch.float8_e4m3fn)}), "stored as F8_E4M3, and config.json has no quant"),
        (lambda t: t.update({UP: t[UP].to(torch.int8)}), "stored as I8"),
    ],
)
def test_what_is_missing_left_over_or_of_another_kind_is_named(
    folder: Path, change: Callable[[Tensors], object], sentence: str
) -> None:
    edit(folder, change)
    refused(folder, sentence)


def test_tensors_that_are_computed_anew_may_lie_there(folder: Path) -> None:
    edit(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    opened(folder)


def test_a_tied_model_may_hold_a_copy_of_its_embedding_but_no_other_head(folder: Path) -> None:
    edit(folder, lambda t: None, tie_word_embeddings=True)
    refused(
        folder, "tie_word_embeddings=true .* differs from model.embed_tokens.weight; set tie_word_embeddings to false"
    )
    edit(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    opened(folder)
    edit(folder, lambda t: t.pop("lm_head.weight"))
    opened(folder)


def split(folder: Path, *leave_out: str) -> None:
    """Two shards and an index, as transformers writes them."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    halves = {"model-1.safetensors": names[: len(names) // 2], "model-2.safetensors": names[len(names) // 2 :]}
    for file, held in halves.items():
        save_file({name: tensors[name] for name in held if name not in leave_out}, folder / file)
    weight_map = {name: file for file, held in halves.items() for name in held}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_the_index_decides_which_files_are_read(folder: Path) -> None:
    truth = load_file(folder / "model.safetensors")
    split(folder)
    save_file({name: tensor * 0 for name, tensor in truth.items()}, folder / "model.safetensors")
    save_file({"old.weight": torch.ones(1)}, folder / "old-2.safetensors")
    stored = opened(folder)
    assert torch.equal(stored.read(UP, WHOLE), truth[UP])
    assert {stored.file.name for stored in find_tensors(folder, "").values()} == {
        "model-1.safetensors",
        "model-2.safetensors",
    }


def test_without_an_index_other_files_beside_the_model_are_not_read(folder: Path) -> None:
    truth = load_file(folder / "model.safetensors")
    save_file({name: tensor * 0 for name, tensor in truth.items()}, folder / "consolidated.safetensors")
    assert torch.equal(opened(folder).read(UP, WHOLE), truth[UP])
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    refused(folder, r"2 \*.safetensors but no model.safetensors.index.json")


def test_files_that_are_missing_cut_short_or_no_index_are_named(folder: Path) -> None:
    split(folder, UP)
    refused(folder, f"lacks the tensor {UP}, which model.safetensors.index.json says it has")
    content = (folder / "model-2.safetensors").read_bytes()
    (folder / "model-2.safetensors").write_bytes(content[:1000])
    refused(folder, "model-2.safetensors is not a whole safetensors file")
    (folder / "model-2.safetensors").unlink()
    refused(folder, "model-2.safetensors is missing; .* the model is not whole")
    (folder / "model.safetensors.index.json").write_text("[]")
    refused(folder, "is not the index of a model")


def test_an_adapter_is_refused(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    refused(folder, "holds an adapter .* merge it")


def test_fp8_with_scales_for_blocks_is_read_as_numbers(folder: Path) -> None:
    """The layout of DeepSeek-V3 and of Qwen3's FP8 files: 128 x 128 there, 32 x 48 here, so that edges are cut."""
    truth = load_file(folder / "model.safetensors")[UP].float()
    scales = torch.tensor([[0.5, 2.0], [0.25, 1.0], [4.0, 0.125]])
    spread = scales.repeat_interleave(32, 0).repeat_interleave(48, 1)[:96, :64]
    small = (truth / spread).to(torch.float8_e4m3fn)
    config = {"quant_method": "fp8", "weight_block_size": [32, 48], "activation_scheme": "dynamic"}
    scale = UP.removesuffix("weight") + "weight_scale_inv"
    edit(folder, lambda t: t.update({UP: small, scale: scales}), quantization_config=config)
    read = opened(folder).read(UP, (slice(30, 70), slice(40, 60)))
    assert torch.equal(read, (small.float() * spread)[30:70, 40:60])
    assert (read - truth[30:70, 40:60]).abs().max() < 0.1 * truth.abs().max()
    edit(folder, lambda t: t.update({scale: scales[:2].clone()}))
    refused(folder, r"weight_scale_inv has shape \[2, 2\], which does not fit")
    edit(folder, lambda t: t.pop(scale))
    refused(folder, "its scale .*weight_scale_inv is missing")


@pytest.mark.parametrize("asymmetric", [False, True])
def test_int8_of_compressed_tensors_is_read_as_numbers(folder: Path, asymmetric: bool) -> None:
    truth = load_file(folder / "model.safetensors")[UP].float()
    scale, zero = truth.abs().amax(1, keepdim=True) / 100, torch.full((96, 1), 3, dtype=torch.int8)
    levels = (truth / scale).round() + (3 if asymmetric else 0)
    module = UP.removesuffix(".weight")
    parts = {UP: levels.to(torch.int8), f"{module}.weight_scale": scale.bfloat16()}
    parts |= {f"{module}.weight_zero_point": zero} if asymmetric else {}
    group = {"weights": {"num_bits": 8, "strategy": "channel", "symmetric": not asymmetric}}
    config = {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {"group_0": group}}
    edit(folder, lambda t: t.update(parts), quantization_config=config)
    read = opened(folder).read(UP, WHOLE)
    torch.testing.assert_close(read, truth, atol=float(scale.max()), rtol=0.01)
    assert (read - truth).abs().mean() < scale.mean() / 2


@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "awq"},
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        {
            "quant_method": "compressed-tensors",
            "format": "int-quantized",
            "config_groups": {"group_0": {"weights": {"num_bits": 8, "strategy": "group", "group_size": 32}}},
        },
    ],
)
def test_other_quantized_files_are_refused_by_name(folder: Path, config: dict) -> None:
    edit(folder, lambda t: None, quantization_config=config)
    refused(folder, f"quantization_config of '?{config['quant_method']}.* which is not read")


def test_files_of_modelopt_are_refused(folder: Path) -> None:
    (folder / "hf_quant_config.json").write_text("{}")
    refused(folder, "hf_quant_config.json: weights that ModelOpt quantized")
