"""What a model's `config.json` may say: every key is honoured, has no effect, has its neutral value, or is refused.

A key that is not known here is refused by its name, because it may change what the model computes: engine and trainer
would then run the same wrong model, and their log-probs would agree.
"""

from collections.abc import Collection, Mapping
from typing import Any

from megatron_rl.config.errors import ConfigError
from megatron_rl.config.families import ModelFamily

REQUIRED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "model_type")

HONOURED = {
    *REQUIRED,
    *("architectures", "intermediate_size", "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings"),
    *("initializer_range", "rms_norm_eps", "tie_word_embeddings", "rope_theta", "rope_scaling", "rope_parameters"),
    *("attention_bias", "mlp_bias", "sliding_window", "use_sliding_window", "max_window_layers", "layer_types"),
    *("quantization_config", "dtype", "torch_dtype", "bos_token_id", "eos_token_id", "pad_token_id", "auto_map"),
}
OF_MIXTURES = {
    *("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"),
    *("decoder_sparse_step", "mlp_only_layers"),
}

SIZES = {
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("intermediate_size", "max_position_embeddings", "num_experts", "num_experts_per_tok", "moe_intermediate_size"),
}
NUMBERS = {"rms_norm_eps", "rope_theta", "initializer_range"}
SWITCHES = {"tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window", "norm_topk_prob"}

WITHOUT_EFFECT = {
    # What wrote the file, and what its class returns.
    *("name_or_path", "transformers_version", "torchscript", "return_dict", "return_dict_in_generate", "use_cache"),
    *("output_attentions", "output_hidden_states", "output_scores", "output_router_logits", "use_return_dict"),
    *("use_flash_attn", "use_flash_attention", "attn_implementation", "use_bfloat16", "tf_legacy_loss"),
    *("transformers.js_config", "tokenizer_class", "sep_token_id", "decoder_start_token_id", "is_llama_config"),
    *("gradient_checkpointing", "model_max_length", "max_sequence_length", "license", "library_name", "use_mambapy"),
    # The sums of a product in slices, which newer versions have dropped.
    "pretraining_tp",
    # For classifiers.
    *("id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "task_specific_params"),
    *("classifier_dropout", "prefix", "is_decoder"),
    # For training: a policy is trained as it generated, without dropout or noise, and routers by `train.router_*`.
    *("attention_dropout", "hidden_dropout", "embd_pdrop", "resid_pdrop", "attn_pdrop", "hidden_dropout_prob"),
    *("router_aux_loss_coef", "router_jitter_noise", "router_z_loss_coef"),
    # For generation, which `rollout` decides.
    *("max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty"),
    *("temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size"),
    *("encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "forced_bos_token_id"),
    *("forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens"),
    "begin_suppress_tokens",
}
PREFIXES_WITHOUT_EFFECT = ("_", "unsloth_")

NEUTRAL: dict[str, Any] = {
    "partial_rotary_factor": 1.0,
    "rotary_pct": 1.0,
    "rope_interleaved": False,
    "is_causal": True,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "tie_encoder_decoder": False,
    "chunk_size_feed_forward": 0,
    "pruned_heads": {},
    "bias": False,
    "use_bias": False,
    "qkv_bias": False,
    "qk_norm": False,
    "use_qk_norm": False,
    "use_mrope": False,
    "use_bidirectional_attention": False,
    "logit_scale": 1.0,
    "num_nextn_predict_layers": 0,
    "shared_expert_intermediate_size": 0,
    "n_shared_experts": 0,
}
"""Keys of other models, or of forks, and the value with which they change nothing."""


def check_required(hf: Mapping[str, Any], path: str) -> None:
    """Does a `config.json` say what nothing can be guessed for?

    Args:
        hf: the content, as `ModelFamily.standard` gives it.
        path: `model.path`, for messages.

    Raises:
        ConfigError: naming the key.
    """
    width = "moe_intermediate_size" if "num_experts" in hf else "intermediate_size"
    for key in (*REQUIRED, width):
        if not hf.get(key):
            raise ConfigError(f"model.path={path!r}: config.json lacks {key}; it must be a Hugging Face model's.")
    for keys, kind, named in (
        (SIZES, int, "a whole number above 0"),
        (NUMBERS, (int, float), "a number above 0"),
        (SWITCHES, bool, "true or false"),
    ):
        for key in keys & hf.keys():
            value = hf[key]
            wrong = not isinstance(value, kind) or (kind is not bool and (isinstance(value, bool) or not value > 0))
            if wrong:
                raise ConfigError(f"model.path={path!r}: {key}={value!r} in config.json must be {named}.")
    heads, groups = hf["num_attention_heads"], hf.get("num_key_value_heads", 1)
    if heads % groups or ("head_dim" not in hf and hf["hidden_size"] % heads):
        raise ConfigError(
            f"model.path={path!r}: num_attention_heads={heads} in config.json is no multiple of "
            f"num_key_value_heads={groups}, or does not divide hidden_size={hf['hidden_size']}."
        )


def check_keys(hf: Mapping[str, Any], family: ModelFamily, path: str, ignored: Collection[str] = ()) -> None:
    """Is everything in `config.json` that changes what the model computes known, and supported?

    Args:
        hf: the content, as `ModelFamily.standard` gives it.
        family: the model's.
        path: `model.path`, for messages.
        ignored: `model.ignored_keys`, which the user knows to change nothing.

    Raises:
        ConfigError: naming the key.
    """
    if family.model_type not in (None, hf.get("model_type", family.model_type)):
        raise ConfigError(
            f"model.path={path!r}: config.json has model_type={hf['model_type']!r} beside the architecture "
            f"{family.architecture}, whose type is {family.model_type!r}; correct one of them."
        )
    if "AutoModelForCausalLM" in (hf.get("auto_map") or {}):
        raise ConfigError(
            f"model.path={path!r}: auto_map in config.json names modelling code of its own, which is never run; if the "
            "model is its architecture's plain one, remove auto_map."
        )
    known = HONOURED | WITHOUT_EFFECT | set(family.keys.values()) | (OF_MIXTURES if family.mixture else set())
    neutral = {**NEUTRAL, **family.neutral}
    for key, value in hf.items():
        if key in neutral:
            if value != neutral[key] and key not in ignored:
                raise ConfigError(
                    f"model.path={path!r} has {key}={value!r} in its config.json, but the trainer computes "
                    f"{neutral[key]!r} only; use another model."
                )
        elif key not in known and not key.startswith(PREFIXES_WITHOUT_EFFECT) and key not in ignored:
            raise ConfigError(
                f"model.path={path!r}: {key}={_short(value)} in config.json is not known for {family.architecture}, "
                "and may change what the model computes; if it does not, add it to model.ignored_keys."
            )
    _check_computed(hf, family, path)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _check_computed(hf: Mapping[str, Any], family: ModelFamily, path: str) -> None:
    """Values of known keys that are not supported."""
    if hf.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ConfigError(
            f"model.path={path!r} has hidden_act={hf['hidden_act']!r} in its config.json, but vLLM runs "
            f"{family.architecture} with 'silu' only; use another model."
        )
    for key in ("attention_bias", "mlp_bias"):
        if hf.get(key) and key not in family.biases:
            raise ConfigError(
                f"model.path={path!r} has {key}={hf[key]!r} in its config.json, which vLLM does not compute for "
                f"{family.architecture}; use another model."
            )
    if not family.free_head_dim and hf.get("head_dim", 0) * hf["num_attention_heads"] not in (0, hf.get("hidden_size")):
        raise ConfigError(
            f"model.path={path!r} has head_dim={hf['head_dim']} in its config.json, but vLLM takes hidden_size / "
            f"num_attention_heads for {family.architecture}; use another model."
        )
    attention_window(hf, family, path)


def attention_window(hf: Mapping[str, Any], family: ModelFamily, path: str) -> int | None:
    """How many tokens each position sees, itself among them; None: all before it.

    Args:
        hf: `config.json`, as `ModelFamily.standard` gives it.
        family: the model's.
        path: `model.path`, for messages.

    Raises:
        ConfigError: when only some layers have a window, which vLLM does not run for these families, or when the keys
            contradict each other.
    """
    window, layers = hf.get("sliding_window"), hf["num_hidden_layers"]
    types = hf.get("layer_types")
    if family.window == "none" or not hf.get("use_sliding_window", family.window == "always"):
        used = set(types or ()) - {"full_attention"}
        if used or (window and family.window == "none"):
            key = f"layer_types with {sorted(used)[0]!r}" if used else f"sliding_window={window}"
            raise ConfigError(
                f"model.path={path!r} has {key} in its config.json, which {family.architecture} does not use there, "
                "but vLLM does; remove the key if all layers see everything."
            )
        return None
    if not window:
        return None
    if types is None:
        first = hf.get("max_window_layers", 28) if family.layered_window else 0
        types = ["full_attention"] * min(first, layers) + ["sliding_attention"] * max(layers - first, 0)
    if len(types) != layers or set(types) - {"full_attention", "sliding_attention"}:
        raise ConfigError(
            f"model.path={path!r}: layer_types in config.json must name full_attention or sliding_attention for each "
            f"of the {layers} layers."
        )
    if len(set(types)) > 1:
        raise ConfigError(
            f"model.path={path!r} has a sliding window in some of its layers only (use_sliding_window, "
            "max_window_layers and layer_types in config.json), which vLLM does not run; use another model."
        )
    return int(window) if types[0] == "sliding_attention" else None
