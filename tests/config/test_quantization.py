import pytest

from megatron_rl.config import ConfigError
from megatron_rl.config.model_fit import check_layout
from megatron_rl.config.quantization import is_skipped, skip_patterns
from megatron_rl.config.schema import Config
from megatron_rl.distributed.device import check_device, on_gpu
from megatron_rl.distributed.engine_environment import engine_environment

HF = {
    "architectures": ["Qwen3ForCausalLM"],
    "num_attention_heads": 6,
    "num_hidden_layers": 6,
    "intermediate_size": 512,
}
MIXED = {"engines": 2, "quantization": ["int8", "none"]}


def _config(precision: str = "bf16", **rollout: object) -> Config:
    return Config.model_validate(
        {
            "model": {"path": "m", "precision": precision},
            "run_dir": "r",
            "rollout": rollout,
        }
    )


def test_entries_name_the_first_the_last_and_matching_layers() -> None:
    patterns = skip_patterns(["first:2", "last:1", "*.down_proj"], layers=6)
    skipped = [
        name
        for layer in range(6)
        for name in (f"model.layers.{layer}.self_attn.q_proj", f"model.layers.{layer}.mlp.down_proj")
        if is_skipped([name], patterns)
    ]
    whole = [f"model.layers.{layer}.{name}" for layer in (0, 1) for name in ("self_attn.q_proj", "mlp.down_proj")]
    downs = [f"model.layers.{layer}.mlp.down_proj" for layer in (2, 3, 4)]
    assert skipped == [*whole, *downs, "model.layers.5.self_attn.q_proj", "model.layers.5.mlp.down_proj"]


def test_a_number_is_not_a_prefix_of_another() -> None:
    patterns = skip_patterns(["first:2"], layers=20)
    assert is_skipped(["model.layers.1.mlp.up_proj"], patterns)
    assert not is_skipped(["model.layers.10.mlp.up_proj"], patterns)


@pytest.mark.parametrize(
    "entry", ["first:0", "first:7", "last:", "last:x", "*.dwon_proj", "lm_head", "model.layers.6.*"]
)
def test_an_entry_that_names_nothing_is_refused(entry: str) -> None:
    with pytest.raises(ConfigError, match="rollout.quantization_skip has"):
        skip_patterns([entry], layers=6)
    with pytest.raises(ConfigError, match="rollout.quantization_skip has"):
        check_layout(_config(quantization="int8", quantization_skip=[entry]), HF)


@pytest.mark.parametrize(
    ("precision", "rollout", "parts"),
    [
        ("bf16", {"quantization": "int4"}, ["rollout.quantization", "int8"]),
        ("bf16", {"quantization_skip": ["first:1"]}, ["rollout.quantization_skip", "rollout.quantization=none"]),
        ("bf16", {"quantization": "int8", "verify_weights": True}, ["rollout.verify_weights", "quantization=int8"]),
        ("fp32", {"quantization": "fp8_block"}, ["rollout.quantization=fp8_block", "bf16"]),
        ("fp32", {"quantization": ["none", "fp8"], "engines": 2}, ["rollout.quantization=fp8", "bf16"]),
        ("bf16", {"quantization": [], "engines": 2}, ["rollout.quantization=[]", "int8"]),
        ("bf16", {"quantization": ["none", "int4"], "engines": 2}, ["rollout.quantization=['none', 'int4']", "int8"]),
        ("bf16", {"quantization": ["none", "int8"]}, ["lists 2", "rollout.engines=1"]),
        ("bf16", {"quantization": ["int8"], "engines": 2}, ["lists 1", "without brackets"]),
        ("bf16", {"quantization": ["none", "int8"], "engines": 2, "verify_weights": True}, ["quantization=int8"]),
        ("bf16", {"precision_tail": 0.1}, ["rollout.precision_tail=0.1", "[int8, none]"]),
        ("bf16", {"precision_tail": 0.1, "quantization": "int8", "engines": 2}, ["rollout.precision_tail=0.1"]),
        ("bf16", {**MIXED, "precision_tail": 0.1, "sampler": "rejection"}, ["precision_tail", "sampler=rejection"]),
        ("bf16", {**MIXED, "precision_tail": 0.1, "sampling": {"presence_penalty": 1.0}}, ["presence_penalty"]),
        ("bf16", {"sleep": 1, "placement": "separate"}, ["rollout.sleep=1", "rollout.placement=separate"]),
        (
            "bf16",
            {"sleep": 2, "speculation": {"adaptive": "static", "drafters": ["eagle"]}},
            ["rollout.sleep=2", "EAGLE head"],
        ),
    ],
)
def test_keys_that_contradict_each_other_are_refused(precision: str, rollout: dict, parts: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        _config(precision, **rollout)
    for part in parts:
        assert part in str(caught.value)


def test_engines_take_the_entries_in_turn() -> None:
    assert _config(quantization="int8", engines=2).rollout.precisions == ["int8", "int8"]
    mixed = _config(quantization=["int8", "int8", "none"], engines=5).rollout.precisions
    assert mixed == ["int8", "int8", "none", "int8", "int8"]


@pytest.mark.skipif(on_gpu(), reason="the machine has a GPU")
@pytest.mark.parametrize("kind", ["fp8", "fp8_channel", "fp8_block"])
def test_fp8_is_refused_on_a_cpu(kind: str) -> None:
    config = _config(quantization=kind)
    for refuse in (check_device, lambda config: engine_environment(config, 100, (1,))):
        with pytest.raises(ConfigError, match=f"rollout.quantization={kind} needs a GPU"):
            refuse(config)


@pytest.mark.skipif(on_gpu(), reason="the machine has a GPU")
def test_int8_is_refused_where_its_sums_would_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cpu._is_vnni_supported", lambda: False)
    with pytest.raises(ConfigError, match="AVX-512 VNNI"):
        check_device(_config(quantization="int8"))
