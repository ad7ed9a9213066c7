"""Checks across keys, and against the model's own `config.json`, made before any process group or engine starts."""

import json
from typing import TYPE_CHECKING, Any

from megatron_rl.config.errors import ConfigError
from megatron_rl.config.families import ModelFamily, find_family
from megatron_rl.config.hub import local_folder
from megatron_rl.config.model_keys import attention_window, check_keys, check_required
from megatron_rl.config.quantization import read_quantization_file, skip_patterns

if TYPE_CHECKING:
    from megatron_rl.config.schema import Config


def _check_profile(config: "Config") -> None:
    rollout = config.rollout
    if rollout.quantization_profile is None:
        return
    stored = read_quantization_file(rollout.quantization_profile).quantization
    if stored not in rollout.precisions:
        raise ConfigError(
            f"rollout.quantization_profile={rollout.quantization_profile} is for {stored}, but "
            f"rollout.quantization={rollout.quantization}; set it to {stored} or leave the file out."
        )


def read_hf_config(path: str, family: str | None = None) -> dict[str, Any]:
    """The model's `config.json` as a dict, by the names that its family has in common with the others.

    Args:
        path: the model's folder, or its name on the hub once it has been downloaded.
        family: `model.family`.

    Raises:
        ConfigError: when the folder or file is missing or is not JSON, or the model is of no family.
    """
    folder = local_folder(path)
    file = folder / "config.json"
    if not folder.is_dir():
        raise ConfigError(
            f"model.path={path!r} is not a folder; give one with a Hugging Face model, a model's name on the hub such "
            "as Qwen/Qwen3-8B, or make one with `megatron-rl sft`."
        )
    try:
        content: dict[str, Any] = json.loads(file.read_text())
    except FileNotFoundError:
        raise ConfigError(f"model.path={path!r} has no config.json; it must hold a Hugging Face model.") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{file} is not valid JSON ({error}).") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file} must hold a JSON object.")
    hf = find_family(content, family, path).standard(content)
    check_required(hf, path)
    return hf


def check_layout(config: "Config", hf: dict[str, Any], world_size: int | None = None) -> None:
    """Does the model fit the layout? `hf` is the model's `config.json`; `world_size` the number of trainer processes.

    Raises:
        ConfigError: naming the keys and the remedy.
    """
    family = find_family(hf, config.model.family, config.model.path)
    hf = family.standard(hf)
    check_keys(hf, family, config.model.path, config.model.ignored_keys)
    heads = hf["num_attention_heads"]
    kv_heads = hf.get("num_key_value_heads") or heads
    layers = hf["num_hidden_layers"]
    tp, pp = config.parallel.tp_size, config.parallel.pp_size
    for name, count in (("num_attention_heads", heads), ("num_key_value_heads", kv_heads)):
        if count % tp:
            raise ConfigError(
                f"parallel.tp_size={tp} does not divide the model's {name}={count}; choose a divisor of {count}."
            )
    if not family.mixture and hf["intermediate_size"] % tp:
        raise ConfigError(
            f"parallel.tp_size={tp} does not divide the model's intermediate_size={hf['intermediate_size']}; "
            "choose a divisor."
        )
    if layers % pp:
        raise ConfigError(
            f"parallel.pp_size={pp} does not divide the model's num_hidden_layers={layers}; "
            f"choose a divisor of {layers}."
        )
    if heads % config.rollout.tp_size:
        raise ConfigError(
            f"rollout.tp_size={config.rollout.tp_size} does not divide the model's num_attention_heads={heads}; "
            f"choose a divisor of {heads}."
        )
    _check_length(config, hf, family)
    skip_patterns(config.rollout.quantization_skip, layers)
    _check_experts(config, hf, family.mixture)
    _check_profile(config)
    if world_size is not None:
        check_world_size(config, world_size)


def check_world_size(config: "Config", world_size: int) -> None:
    """Do `parallel.*` and the batch fit `world_size` trainer processes?

    Raises:
        ConfigError: naming the keys and the remedy.
    """
    parallel = config.parallel
    model_size = parallel.model_size
    if world_size % model_size:
        raise ConfigError(
            f"{world_size} trainer processes cannot hold parallel.tp_size x pp_size x cp_size = {model_size}; "
            f"start a multiple of {model_size}."
        )
    dp = world_size // model_size
    stage = world_size // parallel.pp_size
    if stage % parallel.ep_size:
        raise ConfigError(
            f"parallel.ep_size={parallel.ep_size} does not divide the {stage} trainer processes of a pipeline stage "
            f"(tp x cp x dp); choose a divisor of {stage}."
        )
    if parallel.dp_size is not None and parallel.dp_size != dp:
        raise ConfigError(
            f"parallel.dp_size={parallel.dp_size} but {world_size} trainer processes with tp x pp x cp = {model_size} "
            f"give {dp}; start {parallel.dp_size * model_size} processes or set parallel.dp_size to null."
        )
    per_minibatch = config.train.prompts_per_step // config.train.num_minibatches
    if per_minibatch * config.algorithm.group_size < dp:
        raise ConfigError(
            f"a mini-batch of {per_minibatch} prompts x {config.algorithm.group_size} samples cannot be split over "
            f"{dp} data-parallel ranks; raise train.prompts_per_step."
        )


def _check_length(config: "Config", hf: dict[str, Any], family: ModelFamily) -> None:
    longest = config.data.max_prompt_tokens + config.rollout.max_tokens
    positions = hf.get("max_position_embeddings", longest)
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type")) == "yarn":  # its files may state the positions before the stretching
        positions = max(positions, int(rope.get("original_max_position_embeddings", positions) * rope.get("factor", 1)))
    if longest > positions:
        raise ConfigError(
            f"data.max_prompt_tokens + rollout.max_tokens = {longest} exceeds the model's "
            f"max_position_embeddings={positions}; lower one of them."
        )
    window = attention_window(hf, family, config.model.path)
    if window is not None and window < longest and config.parallel.cp_size > 1:
        raise ConfigError(
            f"parallel.cp_size={config.parallel.cp_size} does not work with the model's sliding_window={window}, which "
            f"is shorter than data.max_prompt_tokens + rollout.max_tokens = {longest}; set parallel.cp_size=1."
        )


def _check_experts(config: "Config", hf: dict[str, Any], mixture: bool) -> None:
    if mixture:
        _check_model(config, hf)
        _check_training(config)
        _check_engines(config)
        return
    for key, value, neutral in (
        ("parallel.ep_size", config.parallel.ep_size, 1),
        ("train.router_aux_loss", config.train.router_aux_loss, 0.0),
        ("train.router_z_loss", config.train.router_z_loss, 0.0),
    ):
        if value != neutral:
            raise ConfigError(
                f"{key}={value} is for a mixture of experts, but {hf['architectures'][0]} is dense; leave it out."
            )


def _check_model(config: "Config", hf: dict[str, Any]) -> None:
    experts, ep, tp = int(hf["num_experts"]), config.parallel.ep_size, config.rollout.tp_size
    if hf.get("mlp_only_layers") or hf.get("decoder_sparse_step", 1) != 1:
        raise ConfigError(
            f"model.path={config.model.path!r} mixes dense layers with mixtures of experts (mlp_only_layers or "
            "decoder_sparse_step in its config.json), which is not supported; use a model whose layers are all alike."
        )
    if experts % ep:
        raise ConfigError(
            f"parallel.ep_size={ep} does not divide the model's num_experts={experts}; choose a divisor of {experts}."
        )
    if hf["moe_intermediate_size"] % tp:
        raise ConfigError(
            f"rollout.tp_size={tp} does not divide the model's moe_intermediate_size={hf['moe_intermediate_size']}; "
            "choose a divisor."
        )


def _check_training(config: "Config") -> None:
    if config.parallel.tp_size > 1 and not config.parallel.sequence_parallel:
        raise ConfigError(
            f"parallel.tp_size={config.parallel.tp_size} with a mixture of experts needs "
            "parallel.sequence_parallel=true (Transformer Engine, on a GPU); set it, or use parallel.ep_size instead."
        )
    if config.model.precision == "fp8":
        raise ConfigError("model.precision=fp8 is not supported for a mixture of experts; use bf16.")


def _check_engines(config: "Config") -> None:
    quantized = [precision for precision in config.rollout.precisions if precision != "none"]
    if quantized:
        raise ConfigError(
            f"rollout.quantization={quantized[0]} does not reach the experts, which are most of this model; set it "
            "to none."
        )
    if config.rollout.verify_weights:
        raise ConfigError(
            "rollout.verify_weights=true cannot read the experts of an engine, which vLLM packs for its kernels; set "
            "it to false."
        )
