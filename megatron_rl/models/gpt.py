"""Builds the policy as a megatron-core `GPTModel`."""

import dataclasses
import difflib
import functools
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_rl.config import Config, ConfigError
from megatron_rl.distributed import device
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.attention import PackedAttention

_RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    # Of a mixture of experts its router, too; fused attention computes its inner part again by itself.
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["mlp", "moe"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}
_OUR_KEYS = {
    "tensor_model_parallel_size": "parallel.tp_size",
    "pipeline_model_parallel_size": "parallel.pp_size",
    "context_parallel_size": "parallel.cp_size",
    "expert_model_parallel_size": "parallel.ep_size",
    "sequence_parallel": "parallel.sequence_parallel",
    "recompute_granularity": "train.recompute",
    "moe_aux_loss_coeff": "train.router_aux_loss",
    "moe_z_loss_coeff": "train.router_z_loss",
}


def transformer_config(config: Config, architecture: Architecture) -> TransformerConfig:
    """megatron-core's configuration of `architecture`, with the user's `model.megatron` options applied last.

    Raises:
        ConfigError: for an option that megatron-core does not have or that has a key of ours, and a value that it
            refuses.
    """
    low_precision = config.model.precision != "fp32"
    dtype = torch.bfloat16 if low_precision else torch.float32
    std = architecture.init_std
    options: dict[str, Any] = {
        "num_layers": architecture.layers,
        "hidden_size": architecture.hidden_size,
        "num_attention_heads": architecture.heads,
        "num_query_groups": architecture.kv_heads,
        "kv_channels": architecture.head_dim,
        "ffn_hidden_size": architecture.ffn_hidden_size,
        "normalization": "RMSNorm",
        "layernorm_epsilon": architecture.norm_eps,
        "qk_layernorm": architecture.qk_norm,
        "add_bias_linear": False,
        "add_qkv_bias": architecture.qkv_bias,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "softmax_scale": architecture.softmax_scale,
        "window_size": None if architecture.window is None else (architecture.window - 1, 0),
        "init_method_std": std,
        "tensor_model_parallel_size": config.parallel.tp_size,
        "pipeline_model_parallel_size": config.parallel.pp_size,
        "context_parallel_size": config.parallel.cp_size,
        "sequence_parallel": config.parallel.sequence_parallel,
        "pipeline_dtype": dtype,
        "params_dtype": dtype,
        "bf16": low_precision,
        "fp8": "hybrid" if config.model.precision == "fp8" else None,
        # Micro-batches have the lengths that their sequences give them (refused with the default MoE dispatcher).
        "variable_seq_lengths": True,
        "moe_token_dispatcher_type": "alltoall",
        **_RECOMPUTE[config.train.recompute],
        # The loss is a sum over tokens whose weights are normalised over the whole mini-batch.
        "calculate_per_token_loss": True,
        "use_cpu_initialization": not device.on_gpu(),
        "batch_p2p_comm": device.on_gpu(),
        "gradient_accumulation_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "persist_layer_norm": device.has_transformer_engine(),
    }
    if architecture.experts:
        options |= _mixture(config, architecture)
    known = {field.name for field in dataclasses.fields(TransformerConfig)}
    for name in config.model.megatron:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]}?" if near else "."
            raise ConfigError(f"model.megatron.{name} is not an option of megatron-core's TransformerConfig{hint}")
        if name in _OUR_KEYS:
            raise ConfigError(f"model.megatron.{name} has a key of its own; set {_OUR_KEYS[name]} instead.")
    try:
        return TransformerConfig(**(options | config.model.megatron))
    except (ValueError, AssertionError, TypeError) as error:
        raise ConfigError(f"model.megatron: megatron-core refuses the configuration: {error}") from error


def _mixture(config: Config, architecture: Architecture) -> dict[str, Any]:
    """Options of a mixture of experts.

    Raises:
        ConfigError: on a GPU without Transformer Engine.
    """
    if device.on_gpu() and not device.has_transformer_engine():
        raise ConfigError(
            f"model.path={config.model.path!r} is a mixture of experts: on a GPU its router needs Transformer Engine; "
            "install megatron-rl[cuda]."
        )
    return {
        "num_moe_experts": architecture.experts,
        "moe_ffn_hidden_size": architecture.ffn_hidden_size,
        "moe_router_topk": architecture.experts_per_token,
        # Before: the weights are the probabilities among all experts; after: among the chosen, so they add up to 1.
        "moe_router_pre_softmax": not architecture.normalize_experts,
        "moe_router_dtype": "fp32",
        "moe_grouped_gemm": device.has_transformer_engine(),
        "expert_model_parallel_size": config.parallel.ep_size,
        "expert_tensor_parallel_size": 1,
    }


def _layer_spec(architecture: Architecture) -> ModuleSpec:
    experts = architecture.experts or None
    if device.has_transformer_engine():
        spec = get_gpt_layer_with_transformer_engine_spec(
            num_experts=experts, moe_grouped_gemm=experts is not None, qk_layernorm=architecture.qk_norm
        )
    else:
        spec = get_gpt_layer_local_spec(num_experts=experts, qk_layernorm=architecture.qk_norm, normalization="RMSNorm")
        spec.submodules.self_attention.submodules.core_attention = PackedAttention
        if experts:  # in checkpoints, as with Transformer Engine: the norm stays before the router
            spec.submodules.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.")
    if architecture.output_bias:
        attention = spec.submodules.self_attention.submodules
        attention.linear_proj = _with_bias(attention.linear_proj)
    if architecture.mlp_bias:
        mlp = spec.submodules.mlp
        # A specification in megatron-core 0.16, a partial call in 0.19.
        mlp = mlp.keywords["submodules"] if isinstance(mlp, functools.partial) else mlp.submodules
        mlp.linear_fc1, mlp.linear_fc2 = _with_bias(mlp.linear_fc1), _with_bias(mlp.linear_fc2)
    return spec


def _with_bias(linear: Any) -> Any:
    """`linear` with a bias, whatever megatron-core's `add_bias_linear` says, which decides for all layers at once."""

    class WithBias(linear):
        def __init__(self, *arguments: Any, bias: bool, **options: Any) -> None:
            super().__init__(*arguments, bias=True, **options)

    return WithBias


def build_policy(config: Config, architecture: Architecture) -> GPTModel:
    """This rank's part of the policy, on its device, with random weights.

    Its forward takes packed rows (`input_ids` [1, tokens] int64, `packed_seq_params`) and returns, on the last pipeline
    stage, vocabulary-parallel logits [1, rows, vocab / tp_size] of the rows selected by `select_rows`, and hidden
    states [tokens, 1, hidden] elsewhere.
    """
    tp = config.parallel.tp_size
    model = GPTModel(
        config=transformer_config(config, architecture),
        transformer_layer_spec=_layer_spec(architecture),
        vocab_size=architecture.padded_vocab(tp),
        max_sequence_length=architecture.max_positions,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=architecture.tied,
        position_embedding_type="rope",
    )
    frequencies = model.rotary_pos_emb.inv_freq
    model.rotary_pos_emb.inv_freq = architecture.inverse_frequencies().to(frequencies.device)
    target = torch.device("cuda", torch.cuda.current_device()) if device.on_gpu() else torch.device("cpu")
    model = model.to(device=target, dtype=model.config.params_dtype)
    if model.post_process and not config.parallel.sequence_parallel:
        compute_selected_rows_only(model)
    return model


def compute_selected_rows_only(model: GPTModel) -> None:
    """Prompt tokens need no logits: drop their rows before the output layer, the largest of the model."""

    def select(layer: torch.nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        rows = model.selected_rows
        return arguments if rows is None else (arguments[0].index_select(0, rows), *arguments[1:])

    model.selected_rows = None
    model.output_layer.register_forward_pre_hook(select)
