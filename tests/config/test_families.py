"""Which family a model is of, and what the trainer does not compute."""

import sys
from pathlib import Path

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from megatron_rl.config import Config, ConfigError
from megatron_rl.config.families import FAMILIES, QWEN2, QWEN3, QWEN3_MOE, ModelFamily, find_family
from megatron_rl.config.model_fit import check_layout
from megatron_rl.config.model_keys import attention_window, check_keys
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
    "model_type": "wide",
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
        (
            {"hidden_act": "gelu"},
            "has hidden_act='gelu' .*, but vLLM runs Qwen3ForCausalLM with 'silu'",
        ),
        ({"attention_bias": True}, "has attention_bias=True .*, which vLLM does not compute for Qwen3ForCausalLM"),
        ({"mlp_bias": True}, "has mlp_bias=True"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 .*, but the trainer computes 1.0 only"),
        ({"is_causal": False}, "is_causal=False"),
        ({"logit_softcapping": 30.0}, "logit_softcapping=30.0 in config.json is not known .* model.ignored_keys"),
        ({"num_experts": 8}, "num_experts=8 in config.json is not known for Qwen3ForCausalLM"),
        ({"model_type": "qwen2"}, "model_type='qwen2' beside the architecture Qwen3ForCausalLM"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}, "auto_map in config.json names modelling code"),
        ({"use_sliding_window": True, "max_window_layers": 3}, "a sliding window in some of its layers only"),
        ({"layer_types": ["sliding_attention"] * 6}, "layer_types with 'sliding_attention'"),
        ({"use_sliding_window": True, "layer_types": ["sliding_attention"] * 5}, "each of the 6 layers"),
    ],
)
def test_what_the_trainer_would_compute_otherwise_is_refused(hf: dict, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        check_layout(experiment(), HF | hf)


@pytest.mark.parametrize(
    "hf",
    [
        {"some_tool_version": None},
        {"_name_or_path": "x", "unsloth_version": "2025.1", "transformers.js_config": {"dtype": "q4"}},
        {"attention_dropout": 0.1, "torch_dtype": "bfloat16", "pretraining_tp": 1},
        {"hidden_act": "swish", "partial_rotary_factor": 1.0, "attention_bias": False},
        {"auto_map": {"AutoConfig": "configuration_x.X"}},
    ],
)
def test_what_changes_nothing_is_accepted(hf: dict) -> None:
    check_layout(experiment(), HF | hf)


def test_a_key_that_the_user_vouches_for_is_accepted() -> None:
    config = experiment()
    vouched = config.model_copy(update={"model": config.model.model_copy(update={"ignored_keys": ["note"]})})
    check_layout(vouched, HF | {"note": "merged"})


@pytest.mark.parametrize(
    ("family", "hf", "window"),
    [
        (QWEN2, {"sliding_window": 8, "use_sliding_window": False}, None),
        (QWEN2, {"sliding_window": 8}, None),
        (QWEN2, {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 0}, 8),
        (QWEN2, {"sliding_window": 8, "use_sliding_window": True}, None),  # max_window_layers is 28, layers are 6
        (QWEN2, {"sliding_window": None, "use_sliding_window": True, "max_window_layers": 0}, None),
        (QWEN2, {"use_sliding_window": True, "max_window_layers": 0}, 4096),
        (QWEN3_MOE, {"sliding_window": 8, "use_sliding_window": True}, 8),
        (ModelFamily("X", window="always"), {"sliding_window": 8}, 8),
        (ModelFamily("X", window="always"), {"sliding_window": None}, None),
    ],
)
def test_windows_are_those_of_transformers(family: ModelFamily, hf: dict, window: int | None) -> None:
    standard = family.standard({"num_hidden_layers": 6, "num_attention_heads": 4} | hf)
    assert attention_window(standard, family, "m") == window
    assert attention_window(family.standard(standard), family, "m") == window


def test_windows_and_context_parallelism_are_refused_together() -> None:
    config = experiment()
    split = config.model_copy(update={"parallel": config.parallel.model_copy(update={"cp_size": 2})})
    hf = HF | {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": 64}
    check_layout(config, hf)
    with pytest.raises(ConfigError, match=r"parallel\.cp_size=2 does not work with the model's sliding_window=64"):
        check_layout(split, hf)


def test_null_heads_are_as_many_as_heads_and_left_out_ones_are_transformers_default() -> None:
    shape = {"num_attention_heads": 8, "hidden_size": 64}
    assert QWEN2.standard(shape | {"num_key_value_heads": None})["num_key_value_heads"] == 8
    assert QWEN2.standard(shape)["num_key_value_heads"] == 32
    assert QWEN3.standard(shape)["head_dim"] == 128


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.architecture)
def test_defaults_are_those_of_transformers(family: ModelFamily) -> None:
    theirs = CONFIG_MAPPING[family.model_type](use_sliding_window=True) if family.window != "none" else None
    theirs = theirs or CONFIG_MAPPING[family.model_type]()
    hf = family.standard({"hidden_size": theirs.hidden_size, "num_attention_heads": theirs.num_attention_heads})
    for ours, value in family.defaults.items():
        assert getattr(theirs, family.keys.get(ours, ours)) == value, ours
    assert (hf.get("num_key_value_heads") or theirs.num_attention_heads) == theirs.num_key_value_heads
    assert hf.get("max_position_embeddings", 2048) == theirs.max_position_embeddings
    assert hf.get("rms_norm_eps", 1e-6) == theirs.rms_norm_eps
    assert hf.get("tie_word_embeddings", False) == theirs.tie_word_embeddings


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.architecture)
def test_every_key_that_transformers_writes_is_known(family: ModelFamily, tmp_path: Path) -> None:
    theirs = CONFIG_MAPPING[family.model_type](num_hidden_layers=6, architectures=[family.architecture])
    written = theirs.to_dict()
    check_keys(family.standard(written), family, "m")


def test_positions_that_are_not_supported_are_one_sentence() -> None:
    for scaling, sentence in (
        ({"type": "dynamic", "factor": 4.0}, "rope_type 'dynamic' is not supported; supported are default, linear"),
        ({"type": "linear"}, "the linear rotary embedding lacks factor"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
        ({"rope_type": "default", "mrope_section": [8, 8]}, "mrope_section of the default rotary embedding"),
        ({"full_attention": {"rope_type": "default"}}, "full_attention of the default rotary embedding"),
    ):
        hf = HF | {"hidden_size": 48, "vocab_size": 99, "rope_scaling": scaling}
        with pytest.raises(ConfigError, match=rf"config\.json: {sentence}"):
            Architecture.from_hf(hf)
    both = {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}}
    with pytest.raises(ConfigError, match="rope_scaling and rope_parameters contradict each other"):
        Architecture.from_hf(HF | {"hidden_size": 48, "vocab_size": 99} | both)
