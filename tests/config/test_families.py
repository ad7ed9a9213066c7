"""Which family a model is of, and what the trainer does not compute."""

import sys
from pathlib import Path

import pytest

from megatron_rl.config import Config, ConfigError
from megatron_rl.config.families import FAMILIES, QWEN3_MOE, ModelFamily, find_family
from megatron_rl.config.model_fit import check_layout
from megatron_rl.models.architecture import Architecture
from tests.config.test_model_fit import HF

OWN = """
from megatron_rl.config.families import ModelFamily

WIDE = ModelFamily(
    "WideForCausalLM",
    qkv_bias=True,
    keys={"num_hidden_layers": "n_layer", "intermediate_size": "n_inner"},
    tensors={".self_attn.": ".attention.", "input_layernorm": "ln_1"},
)
NUMBER = 3
"""
WIDE_HF = {
    "architectures": ["WideForCausalLM"],
    "hidden_size": 48,
    "num_attention_heads": 6,
    "n_layer": 4,
    "n_inner": 96,
    "vocab_size": 99,
    "max_position_embeddings": 4096,
}


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module with a family of the user's."""
    (tmp_path / "own_families.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_families", raising=False)
    return "own_families"


def experiment(family: str | None = None, **sections: object) -> Config:
    values = {"model": {"path": "m", "family": family}, "train": {"tokens_per_microbatch": 8192}, "run_dir": "r"}
    return Config.model_validate(values | sections)


def test_families_are_found_by_their_architecture() -> None:
    for name, family in FAMILIES.items():
        assert find_family({"architectures": [name]}) is family
        assert family.architecture == name


def test_a_users_family_is_found_by_its_import_path_and_shapes_the_model(own: str) -> None:
    arch = Architecture.from_hf(WIDE_HF, f"{own}:WIDE")
    assert (arch.layers, arch.ffn_hidden_size, arch.qkv_bias, arch.qk_norm, arch.experts) == (4, 96, True, False, 0)
    assert arch.family.tensor_name("model.layers.0.self_attn.q_proj.bias") == "model.layers.0.attention.q_proj.bias"
    assert arch.family.tensor_name("model.layers.0.input_layernorm.weight") == "model.layers.0.ln_1.weight"
    assert arch.family.tensor_name("lm_head.weight") == "lm_head.weight"
    check_layout(experiment(f"{own}:WIDE", parallel={"pp_size": 4}), WIDE_HF)
    with pytest.raises(ConfigError, match=r"parallel\.pp_size=3 does not divide the model's num_hidden_layers=4"):
        check_layout(experiment(f"{own}:WIDE", parallel={"pp_size": 3}), WIDE_HF)


@pytest.mark.parametrize(
    ("named", "sentence"),
    [
        (
            "no_such_module:WIDE",
            r"^model\.family=no_such_module:WIDE: importing no_such_module failed with ModuleNotFound",
        ),
        ("own_families:NARROW", r"own_families has no NARROW that is a megatron_rl\.config\.families\.ModelFamily"),
        ("own_families:NUMBER", r"own_families has no NUMBER that is a"),
    ],
)
def test_a_wrong_import_path_is_one_sentence(own: str, named: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        find_family(WIDE_HF, named)


def test_a_family_of_another_architecture_is_refused(own: str) -> None:
    with pytest.raises(
        ConfigError, match=r"model\.family=own_families:WIDE is for WideForCausalLM, but .*'m' is a Qwen3"
    ):
        check_layout(experiment(f"{own}:WIDE"), HF)
    with pytest.raises(ValueError, match=r"model\.family"):
        experiment("own_families")


def test_what_config_json_says_wins_over_other_names_and_defaults() -> None:
    family = ModelFamily("X", keys={"num_experts": "experts"}, defaults={"norm_topk_prob": True})
    assert family.standard({"experts": 4}) == {"num_experts": 4, "experts": 4, "norm_topk_prob": True}
    assert family.standard({"experts": 4, "num_experts": 8, "norm_topk_prob": False})["num_experts"] == 8
    assert not family.standard({"norm_topk_prob": False})["norm_topk_prob"]
    standard = QWEN3_MOE.standard({"num_local_experts": 6})
    assert QWEN3_MOE.standard(standard) == standard


@pytest.mark.parametrize(
    ("hf", "sentence"),
    [
        ({"hidden_act": "gelu"}, "has hidden_act='gelu' in its config.json, but the trainer computes 'silu' only"),
        ({"attention_bias": True}, "has attention_bias=True"),
        ({"mlp_bias": True}, "has mlp_bias=True"),
        ({"sliding_window": 1024}, r"max_prompt_tokens \+ rollout.max_tokens = 2048 exceeds .*sliding_window=1024"),
    ],
)
def test_what_the_trainer_would_compute_otherwise_is_refused(hf: dict, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        check_layout(experiment(), HF | hf)


def test_a_window_that_is_off_or_wide_enough_is_accepted() -> None:
    for hf in (
        {"sliding_window": 1024, "use_sliding_window": False},
        {"sliding_window": 2048},
        {"sliding_window": None},
    ):
        check_layout(experiment(), HF | hf)


def test_positions_that_are_not_supported_are_one_sentence() -> None:
    hf = HF | {"hidden_size": 48, "vocab_size": 99, "rope_scaling": {"type": "yarn", "factor": 4.0}}
    with pytest.raises(ConfigError, match=r"config\.json: rope_type 'yarn' is not supported"):
        Architecture.from_hf(hf)
