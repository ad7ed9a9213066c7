"""Heads on disk: round trips, the names of public checkpoints, and errors that say what is wrong."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from drafter.eagle.head import EagleHead, HeadConfig, default_aux_layers
from drafter.eagle.head_files import head_tensors, load_head, save_head
from drafter.eagle.vocabulary import DraftVocabulary
from tests.drafter.policies import small_config

VOCABULARY = DraftVocabulary(torch.tensor([0, 1, 3, 4, 8, 9, 15, 16, 22, 23]), 24)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def make_head(kind: str = "eagle3", reduced: bool = True, **overrides: Any) -> EagleHead:
    torch.manual_seed(0)
    if kind == "eagle3" and reduced:
        return EagleHead(small_config(kind, draft_vocab_size=10, **overrides), VOCABULARY)
    return EagleHead(small_config(kind, **overrides))


def edit(folder: Path, tensors: dict[str, Tensor | None] | None = None, **config: Any) -> None:
    """Put other tensors or keys into a saved folder; None removes."""
    file = folder / "model.safetensors"
    merged = load_file(file) | (tensors or {})
    save_file({name: tensor for name, tensor in merged.items() if tensor is not None}, file)
    hf = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps({key: value for key, value in hf.items() if value is not None}))


@pytest.mark.parametrize(
    ("kind", "reduced", "overrides", "dtype"),
    [
        ("eagle3", True, {"rope": LLAMA3, "norm_eps": 1e-5}, torch.float32),
        ("eagle3", False, {"rope": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, torch.float32),
        ("eagle3", True, {"aux_layers": (1, 4)}, torch.bfloat16),
        ("eagle", False, {}, torch.float32),
    ],
)
def test_a_saved_head_is_loaded_as_it_was(
    tmp_path: Path, kind: str, reduced: bool, overrides: dict[str, Any], dtype: torch.dtype
) -> None:
    head = make_head(kind, reduced, **overrides).to(dtype)
    save_head(head, tmp_path / "head")
    loaded = load_head(tmp_path / "head")
    assert loaded.config == head.config
    assert torch.equal(loaded.token_ids, head.token_ids)
    for name, tensor in head.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor) and loaded.state_dict()[name].dtype == tensor.dtype, name
    assert json.loads((tmp_path / "head" / "config.json").read_text())["torch_dtype"] == str(dtype)[6:]


def test_names_are_those_of_public_checkpoints_and_the_policy_s_tensors_are_not_among_them() -> None:
    layer = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"}
    layer |= {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "post_attention_layernorm"}
    eagle = {"fc.weight"} | {f"layers.0.{name}.weight" for name in layer}
    assert head_tensors(make_head("eagle")).keys() == eagle
    layer |= {"input_layernorm", "hidden_norm"}
    eagle3 = {"fc.weight", "norm.weight", "lm_head.weight"} | {f"midlayer.{name}.weight" for name in layer}
    assert head_tensors(make_head("eagle3", reduced=False)).keys() == eagle3
    tensors = head_tensors(make_head("eagle3"))
    assert tensors.keys() == eagle3 | {"d2t", "t2d"}
    assert torch.equal(tensors["d2t"] + torch.arange(10), VOCABULARY.token_ids)
    assert tensors["t2d"].nonzero()[:, 0].tolist() == VOCABULARY.token_ids.tolist()


@pytest.mark.parametrize("kind", ["eagle3", "eagle"])
def test_public_variants_of_the_format_are_loaded(tmp_path: Path, kind: str) -> None:
    head = make_head(kind)
    save_head(head, tmp_path)
    tensors = {f"model.{name}": tensor for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    tensors = {name.replace("model.midlayer", "model.layers.0"): tensor for name, tensor in tensors.items()}
    tensors |= {"model.embed_tokens.weight": torch.zeros(24, 32)}
    tensors |= {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    if kind == "eagle":
        tensors["lm_head.weight"] = torch.zeros(24, 32)
    (tmp_path / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    hf = json.loads((tmp_path / "config.json").read_text())
    del hf["rope_parameters"]  # as transformers 4 wrote it
    hf.pop("eagle_config", None)
    (tmp_path / "config.json").write_text(json.dumps(hf))
    loaded = load_head(tmp_path, policy_layers=32)
    assert loaded.config.aux_layers == ((2, 16, 29) if kind == "eagle3" else ())
    assert loaded.config.rope == head.config.rope
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in head.state_dict().items())


def test_saving_replaces_a_folder_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    save_head(make_head("eagle"), tmp_path / "head")
    (tmp_path / "head.tmp").mkdir()  # what a crash left
    save_head(make_head("eagle3"), tmp_path / "head")
    assert load_head(tmp_path / "head").config.kind == "eagle3"
    assert [path.name for path in tmp_path.iterdir()] == ["head"]


def test_a_failed_write_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_head(make_head("eagle"), tmp_path / "head")

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("drafter.eagle.head_files.save_file", fail)
    with pytest.raises(OSError, match="no space left"):
        save_head(make_head("eagle3"), tmp_path / "head")
    assert load_head(tmp_path / "head").config.kind == "eagle"


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        ({"fc.weight": None}, {}, r"model.safetensors: the tensor 'fc.weight' is missing"),
        (
            {"midlayer.mlp.up_proj.weight": torch.zeros(3, 32)},
            {},
            r"'midlayer.mlp.up_proj.weight' has the shape \[3, 32\]",
        ),
        ({"d2t": None}, {}, "model.safetensors: the tensor 'd2t' is missing"),
        ({"d2t": torch.zeros(7)}, {}, r"'d2t' has the shape \[7\], but config.json asks for \[10\]"),
        ({"d2t": torch.full((10,), 20)}, {}, "'d2t' does not give ascending token ids below 24"),
        ({"midlayer.self_attn.q_proj.bias": torch.zeros(32)}, {}, "q_proj.bias' belongs to a kind of head"),
        ({}, {"hidden_size": None}, "config.json: the key 'hidden_size' is missing"),
        ({}, {"norm_before_residual": True}, "config.json: norm_before_residual is set"),
        ({}, {"num_hidden_layers": 2}, "no head of one Llama layer"),
        ({}, {"architectures": ["MedusaModel"]}, "'MedusaModel' is no head"),
        ({}, {"eagle_config": None}, "does not name eagle_aux_hidden_state_layer_ids"),
        ({}, {"target_hidden_size": 64}, "target_hidden_size is 64"),
        ({}, {"rope_parameters": {"rope_type": "yarn"}}, "config.json: the yarn rotary embedding lacks factor"),
        ({}, {"rope_parameters": {"rope_type": "longrope"}}, "config.json: rope_type 'longrope' is not supported"),
    ],
)
def test_a_bad_folder_is_refused_in_one_sentence(
    tmp_path: Path, tensors: dict[str, Tensor | None], config: dict[str, Any], message: str
) -> None:
    save_head(make_head(), tmp_path / "head")
    edit(tmp_path / "head", tensors, **config)
    with pytest.raises(ValueError, match=message) as error:
        load_head(tmp_path / "head")
    assert str(tmp_path / "head") in str(error.value)
    assert "\n" not in str(error.value)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="config.json does not exist"):
        load_head(tmp_path)
    save_head(make_head(), tmp_path / "head")
    (tmp_path / "head" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="neither .* nor pytorch_model.bin"):
        load_head(tmp_path / "head")


def test_default_depths_ascend_for_every_policy() -> None:
    for layers in range(1, 80):
        depths = default_aux_layers(layers)
        assert list(depths) == sorted(set(depths)) and depths[0] >= 0 and depths[-1] <= layers
    assert default_aux_layers(36) == (2, 18, 33)


@pytest.mark.parametrize(
    "overrides",
    [{"aux_layers": (2, 2, 5)}, {"aux_layers": ()}, {"heads": 3}, {"draft_vocab_size": 25}],
)
def test_impossible_shapes_are_refused(overrides: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        small_config(**overrides)


def test_a_head_for_a_policy_takes_its_shape() -> None:
    hf = {
        "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 96,
        "vocab_size": 128, "num_hidden_layers": 28, "rms_norm_eps": 1e-5, "rope_theta": 1e6,
    }  # fmt: skip
    config = HeadConfig.for_policy(hf, draft_vocab_size=50)
    assert (config.heads, config.kv_heads, config.head_dim, config.ffn_hidden_size) == (4, 2, 32, 96)
    assert (config.aux_layers, config.draft_vocab_size) == ((2, 14, 25), 50)
    assert config.rope == {"rope_theta": 1e6, "rope_type": "default"}
    with pytest.raises(ValueError, match="10 of 24"):
        EagleHead(config, VOCABULARY)
