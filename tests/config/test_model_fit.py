import json

import pytest

from megatron_rl.config import ConfigError
from megatron_rl.config.model_fit import check_layout, check_world_size, read_hf_config
from megatron_rl.config.schema import Config

HF = {
    "architectures": ["Qwen3ForCausalLM"],
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "num_hidden_layers": 6,
    "intermediate_size": 512,
    "max_position_embeddings": 4096,
}


def _config(**sections):
    train = {"tokens_per_microbatch": 4096} | sections.pop("train", {})
    rest = {"model": {"path": "m"}, "run_dir": "r", "train": train}
    return Config.model_validate(rest | sections)


def _refused(*parts, **sections):
    with pytest.raises(ValueError) as caught:
        _config(**sections)
    for part in parts:
        assert part in str(caught.value)


def test_sections_must_fit_each_other():
    _refused("train.prompts_per_step=32", "train.num_minibatches=5", train={"num_minibatches": 5})
    _refused("parallel.tp_size > 1", parallel={"sequence_parallel": True})
    eagle = {"speculation": {"drafters": ["eagle"], "adaptive": "thompson"}}
    _refused("parallel.cp_size=2", "eagle", parallel={"cp_size": 2}, rollout=eagle)
    _refused("train.tokens_per_microbatch=100", "at least 2048", train={"tokens_per_microbatch": 100})
    mixed = {"quantization": ["none", "int8"], "engines": 2, "precision_tail": 0.1}
    _refused("algorithm.dynamic_sampling=9", "rollout.precision_tail", algorithm={"name": "dapo"}, rollout=mixed)
    _refused("reward.length_penalty.start=1024", reward={"length_penalty": {"start": 1024}})
    warmup = {"critic": {"warmup_steps": 10}}
    _refused("algorithm.critic.warmup_steps=10", "train.steps=10", algorithm=warmup, train={"steps": 10})
    _refused("min_doublings", "max_doublings", data={"arithmetic": {"min_doublings": 5, "max_doublings": 2}})
    _refused("data.arithmetic.digits=3", "max_doublings=6", data={"arithmetic": {"digits": 3}})


def test_old_log_probs_come_from_the_update_unless_they_are_needed_before_it():
    assert _config().scores_in_update
    assert _config(algorithm={"correction": {"level": "sequence", "reused": "leave"}}).scores_in_update
    assert _config(algorithm={"kl": {"coef": 0.1}}).scores_in_update
    head = {"rollout": {"speculation": {"drafters": ["eagle"], "adaptive": "thompson"}}}
    assert _config(**head, drafter={"fill": []}).scores_in_update
    before = [
        {"train": {"num_minibatches": 2}},
        head,
        {"algorithm": {"name": "ppo", "kl": {"coef": 0.1, "place": "reward"}}},
        *({"algorithm": {"correction": form}} for form in ({"kind": "mask"}, {"veto": 0.1}, {"normalize": True})),
        {"algorithm": {"correction": {"reused": "mask"}}},
    ]
    for sections in before:
        assert not _config(**sections).scores_in_update, sections


@pytest.mark.parametrize(
    ("correction", "key"),
    [
        ({"kind": "tis", "level": "geometric"}, "algorithm.correction.level=geometric needs"),
        ({"kind": "none", "level": "geometric"}, "algorithm.correction.level=geometric needs"),
        ({"kind": "none", "level": "sequence"}, "algorithm.correction.level=sequence has no meaning"),
        ({"kind": "tis", "floor": 0.5}, "algorithm.correction.floor=0.5 needs"),
        ({"kind": "none", "floor": 0.5}, "algorithm.correction.floor=0.5 needs"),
        ({"kind": "none", "normalize": True}, "algorithm.correction.normalize=true has no meaning"),
        ({"cap": 0.9}, "algorithm.correction.cap"),
        ({"kind": "mask", "floor": 1.1}, "algorithm.correction.floor"),
        ({"veto": 0.0}, "algorithm.correction.veto"),
    ],
)
def test_a_correction_that_means_nothing_is_refused(correction, key):
    _refused(key, algorithm={"correction": correction})


@pytest.mark.parametrize(
    "correction",
    [
        {"kind": "none", "veto": 1e-4},
        {"level": "sequence", "normalize": True},
        {"kind": "mask", "floor": 0.5, "cap": 5.0, "veto": 1e-4},
        {"kind": "mask", "level": "sequence"},
        {"kind": "mask", "level": "geometric", "floor": 0.99, "cap": 1.01, "normalize": True},
    ],
)
def test_every_form_of_correction_is_accepted(correction):
    found = _config(algorithm={"correction": correction}).algorithm.correction
    assert {key: getattr(found, key) for key in correction} == correction


@pytest.mark.parametrize(
    ("sections", "hf", "parts"),
    [
        ({"parallel": {"tp_size": 4}}, {}, ["parallel.tp_size=4", "num_attention_heads=6"]),
        ({"parallel": {"tp_size": 3}}, {}, ["parallel.tp_size=3", "num_key_value_heads=2"]),
        ({"parallel": {"tp_size": 2}}, {"intermediate_size": 511}, ["parallel.tp_size=2", "intermediate_size=511"]),
        ({"parallel": {"pp_size": 4}}, {}, ["parallel.pp_size=4", "num_hidden_layers=6"]),
        ({"rollout": {"tp_size": 4}}, {}, ["rollout.tp_size=4", "num_attention_heads=6"]),
        ({}, {"architectures": ["GPT2LMHeadModel"]}, ["GPT2LMHeadModel", "LlamaForCausalLM"]),
        ({}, {"max_position_embeddings": 2047}, ["= 2048", "max_position_embeddings=2047"]),
    ],
)
def test_a_model_that_does_not_fit_the_layout_is_refused(sections, hf, parts):
    with pytest.raises(ConfigError) as caught:
        check_layout(_config(**sections), HF | hf)
    for part in parts:
        assert part in str(caught.value)


MIXTURE = HF | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_local_experts": 6,  # as transformers 5 writes it; 4 wrote num_experts
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}


@pytest.mark.parametrize(
    ("sections", "hf", "parts"),
    [
        ({"parallel": {"ep_size": 4}}, {}, ["parallel.ep_size=4", "num_experts=6"]),
        ({"parallel": {"ep_size": 4}}, {"num_experts": 9}, ["num_experts=9"]),
        ({"parallel": {"tp_size": 2}}, {}, ["parallel.tp_size=2", "parallel.sequence_parallel=true"]),
        ({"model": {"path": "m", "precision": "fp8"}}, {}, ["model.precision=fp8", "bf16"]),
        ({"rollout": {"tp_size": 3}}, {"moe_intermediate_size": 32}, ["rollout.tp_size=3", "moe_intermediate_size=32"]),
        ({"rollout": {"quantization": "int8"}}, {}, ["rollout.quantization=int8", "none"]),
        ({"rollout": {"verify_weights": True}}, {}, ["rollout.verify_weights=true", "false"]),
        ({}, {"mlp_only_layers": [0]}, ["mlp_only_layers"]),
        ({}, {"decoder_sparse_step": 2}, ["decoder_sparse_step"]),
    ],
)
def test_a_mixture_of_experts_that_does_not_fit_is_refused(sections, hf, parts):
    with pytest.raises(ConfigError) as caught:
        check_layout(_config(**sections), MIXTURE | hf)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"parallel": {"ep_size": 2}}, "parallel.ep_size=2"),
        ({"train": {"router_aux_loss": 0.1}}, "train.router_aux_loss=0.1"),
        ({"train": {"router_z_loss": 0.1}}, "train.router_z_loss=0.1"),
    ],
)
def test_keys_of_experts_are_refused_for_a_dense_model(sections, key):
    with pytest.raises(ConfigError, match=f"{key} is for a mixture of experts, but Qwen3ForCausalLM is dense"):
        check_layout(_config(**sections), HF)


def test_experts_are_dealt_to_the_processes_of_a_stage():
    split = {"tp_size": 2, "sequence_parallel": True, "pp_size": 2, "ep_size": 6}
    with pytest.raises(ConfigError, match="parallel.ep_size=6 does not divide the 4 trainer processes"):
        check_layout(_config(parallel=split), MIXTURE, world_size=8)
    check_layout(_config(parallel=split), MIXTURE, world_size=12)
    # The width of its dense layers, which the model does not have, is not split.
    check_layout(_config(parallel=split), MIXTURE | {"intermediate_size": 511}, world_size=12)


def test_a_model_that_fits_is_accepted():
    check_layout(_config(parallel={"tp_size": 2, "pp_size": 3}), HF, world_size=12)
    as_many = {"num_key_value_heads": None, "intermediate_size": 513}
    check_layout(_config(parallel={"tp_size": 3}), HF | as_many)


def test_the_number_of_processes_must_fit():
    two_by_two = {"tp_size": 2, "pp_size": 2}
    with pytest.raises(ConfigError, match="6 trainer processes.*multiple of 4"):
        check_world_size(_config(parallel=two_by_two), 6)
    with pytest.raises(ConfigError, match="cp_size = 8; start a multiple of 8"):
        check_world_size(_config(parallel=two_by_two | {"cp_size": 2}), 12)
    with pytest.raises(ConfigError, match="parallel.dp_size=3.*start 12 processes"):
        check_world_size(_config(parallel=two_by_two | {"dp_size": 3}), 8)
    check_world_size(_config(parallel=two_by_two | {"dp_size": 2}), 8)


def test_a_mini_batch_must_reach_every_data_parallel_rank():
    small = {"prompts_per_step": 4, "num_minibatches": 4}
    with pytest.raises(ConfigError, match="1 prompts x 8 samples cannot be split over 16"):
        check_world_size(_config(train=small), 16)
    check_world_size(_config(train=small), 8)


def test_a_model_folder_without_a_readable_config_is_one_sentence(tmp_path):
    with pytest.raises(ConfigError, match="is not a folder"):
        read_hf_config(str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"no config\.json"):
        read_hf_config(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        read_hf_config(str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="must hold a JSON object"):
        read_hf_config(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(HF))
    with pytest.raises(ConfigError, match=r"config\.json lacks vocab_size"):
        read_hf_config(str(tmp_path))
    for wrong, sentence in (
        ({"num_attention_heads": "6"}, "num_attention_heads='6' in config.json must be a whole number above 0"),
        ({"num_hidden_layers": 6.5}, "num_hidden_layers=6.5"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps='1e-6' in config.json must be a number above 0"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes' in config.json must be true or false"),
        ({"num_key_value_heads": 4}, "num_attention_heads=6 in config.json is no multiple of num_key_value_heads=4"),
        ({"intermediate_size": None}, "lacks intermediate_size"),
        ({"architectures": None}, "names no architectures"),
    ):
        shape = {"model_type": "qwen3", "vocab_size": 99, "hidden_size": 64}
        (tmp_path / "config.json").write_text(json.dumps(HF | shape | wrong))
        with pytest.raises(ConfigError, match=sentence):
            read_hf_config(str(tmp_path))
    whole = HF | {"model_type": "qwen3", "vocab_size": 99, "hidden_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    assert read_hf_config(str(tmp_path)).items() >= whole.items()
