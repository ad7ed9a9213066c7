"""Checks of a mixture of experts: what its `config.json` may say, and how the experts are split."""

from typing import TYPE_CHECKING, Any

from megatron_rl.config.errors import ConfigError

if TYPE_CHECKING:
    from megatron_rl.config.schema import Config

MIXTURE = "Qwen3MoeForCausalLM"


def expert_count(hf: dict[str, Any]) -> int:
    """Experts of each layer of a mixture, by its `config.json` of transformers 4 or 5."""
    return int(hf.get("num_experts") or hf["num_local_experts"])


def check_experts(config: "Config", hf: dict[str, Any]) -> None:
    """Do the keys about experts fit the model? `hf` is its `config.json`, of a supported architecture.

    Raises:
        ConfigError: naming the keys and the remedy.
    """
    if hf["architectures"][0] == MIXTURE:
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
    experts, ep, tp = expert_count(hf), config.parallel.ep_size, config.rollout.tp_size
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
