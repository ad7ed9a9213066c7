"""Checks across keys, and against the model's own `config.json`, made before any process group or engine starts."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_rl.config.errors import ConfigError
from megatron_rl.config.experts import MIXTURE, check_experts
from megatron_rl.config.heldout_sets import check_evaluation
from megatron_rl.config.overlap import check_overlap
from megatron_rl.config.quantization import read_quantization_file, skip_patterns

if TYPE_CHECKING:
    from megatron_rl.config.algorithm import Correction
    from megatron_rl.config.rollout import Rollout
    from megatron_rl.config.schema import Config

SUPPORTED_ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", MIXTURE)

MIN_NUMBERS = 100
"""With fewer numbers to choose from, training and held-out problems would be too few to tell apart."""


def check_sections(config: "Config") -> None:
    """Checks across keys of one config.

    Raises:
        ConfigError: naming the keys and the remedy.
    """
    train, rollout, parallel, data = config.train, config.rollout, config.parallel, config.data
    if train.prompts_per_step % train.minibatches:
        raise ConfigError(
            f"train.prompts_per_step={train.prompts_per_step} is not divisible by "
            f"train.minibatches={train.minibatches}; change one of them."
        )
    if parallel.sequence_parallel and parallel.tp_size == 1:
        raise ConfigError("parallel.sequence_parallel=true needs parallel.tp_size > 1; set it to false.")
    if rollout.speculation.uses_head:
        check_drafter(config)
    longest = data.max_prompt_tokens + rollout.max_tokens
    if longest > train.tokens_per_microbatch:
        raise ConfigError(
            f"train.tokens_per_microbatch={train.tokens_per_microbatch} is smaller than the longest sequence, "
            f"data.max_prompt_tokens + rollout.max_tokens = {longest}; raise it to at least {longest}."
        )
    _check_quantization(config)
    _check_sleep(rollout)
    _check_history(config)
    check_overlap(config)
    penalty = config.reward.length_penalty
    if penalty is not None and penalty.start >= rollout.max_tokens:
        raise ConfigError(
            f"reward.length_penalty.start={penalty.start} must be smaller than rollout.max_tokens={rollout.max_tokens}."
        )
    if config.algorithm.dynamic_sampling and rollout.precision_tail:
        raise ConfigError(
            f"algorithm.dynamic_sampling={config.algorithm.dynamic_sampling} adds prompts while the engines generate, "
            "but rollout.precision_tail has to know their number before; set one of them to 0."
        )
    _check_correction(config.algorithm.correction)
    if (warmup := config.algorithm.critic.warmup_steps) >= train.steps:
        raise ConfigError(
            f"algorithm.critic.warmup_steps={warmup} leaves none of train.steps={train.steps} for the policy; lower it."
        )
    check_evaluation(config)
    arithmetic = data.arithmetic
    if arithmetic.min_doublings > arithmetic.max_doublings:
        raise ConfigError("data.arithmetic.min_doublings must not be larger than data.arithmetic.max_doublings.")
    if 10**arithmetic.digits >> arithmetic.max_doublings < MIN_NUMBERS:
        raise ConfigError(
            f"data.arithmetic.digits={arithmetic.digits} leaves fewer than {MIN_NUMBERS} numbers to double "
            f"data.arithmetic.max_doublings={arithmetic.max_doublings} times; raise the first or lower the second."
        )


def check_drafter(config: "Config") -> None:
    """Can an EAGLE head learn from this trainer's policy?

    Raises:
        ConfigError: naming the key and the remedy.
    """
    if config.parallel.cp_size > 1:
        raise ConfigError(
            f"parallel.cp_size={config.parallel.cp_size} deals the tokens that an EAGLE head would learn from to "
            "several devices, which is not supported; set it to 1, or leave eagle out of rollout.speculation.drafters."
        )


def _check_correction(correction: "Correction") -> None:
    kind, level = correction.kind, correction.level
    if level == "geometric" and kind != "mask":
        raise ConfigError(
            f"algorithm.correction.level=geometric needs algorithm.correction.kind=mask, not {kind}; "
            "set one of them to another value."
        )
    if level != "token" and kind == "none":
        raise ConfigError(
            f"algorithm.correction.level={level} has no meaning with algorithm.correction.kind=none; "
            "set level to token or kind to tis or mask."
        )
    if correction.floor is not None and kind != "mask":
        raise ConfigError(
            f"algorithm.correction.floor={correction.floor} needs algorithm.correction.kind=mask, not {kind}; "
            "set floor to null or kind to mask."
        )
    if correction.normalize and kind == "none":
        raise ConfigError(
            "algorithm.correction.normalize=true has no meaning with algorithm.correction.kind=none; "
            "set it to false or kind to tis or mask."
        )


def _check_history(config: "Config") -> None:
    history, verify = config.rollout.history, config.rollout.verify
    if history.mode != "off" and verify != "coupled":
        raise ConfigError(
            f"rollout.history.mode={history.mode} needs rollout.verify=coupled, not {verify}; set one of them to its "
            "default."
        )
    if math.isnan(history.lenience):
        raise ConfigError("rollout.history.lenience must be a number; .inf keeps all tokens, -.inf none.")
    if history.budget is None:
        return
    if history.mode != "lenient":
        raise ConfigError(
            f"rollout.history.budget has no meaning with rollout.history.mode={history.mode}; set it to null, or mode "
            "to lenient."
        )
    if history.budget.measure == "ess" and history.budget.target >= 1:
        raise ConfigError(
            f"rollout.history.budget.target={history.budget.target} must be below 1 with measure=ess: a share of the "
            "kept tokens."
        )
    if math.isinf(history.lenience):
        raise ConfigError(
            f"rollout.history.lenience={history.lenience} is no place for rollout.history.budget to start from; set it "
            "to a finite number such as 0.5."
        )


def _check_quantization(config: "Config") -> None:
    rollout = config.rollout
    _check_fleet(rollout)
    quantized = [precision for precision in rollout.precisions if precision != "none"]
    if not quantized:
        if rollout.quantization_skip:
            raise ConfigError(
                "rollout.quantization_skip has no effect with rollout.quantization=none; choose a precision there, or "
                "leave it empty."
            )
        if rollout.quantization_profile is not None:
            raise ConfigError(
                "rollout.quantization_profile has no effect with rollout.quantization=none; set that to int8, or leave "
                "the file out."
            )
        return
    if rollout.verify_weights:
        raise ConfigError(
            f"rollout.verify_weights=true cannot compare weights that rollout.quantization={quantized[0]} has "
            "rounded; set one of them to its default."
        )
    for precision in quantized:
        if precision != "int8" and config.model.precision == "fp32":
            raise ConfigError(
                f"rollout.quantization={precision} needs bf16 activations, but model.precision=fp32; use bf16."
            )


def _check_fleet(rollout: "Rollout") -> None:
    listed = rollout.quantization
    if isinstance(listed, list) and not 2 <= len(listed) <= rollout.engines:
        raise ConfigError(
            f"rollout.quantization lists {len(listed)} precision(s) for rollout.engines={rollout.engines}; give at "
            "least two and at most one per engine, or a single value without brackets."
        )
    if not rollout.precision_tail:
        return
    if "none" not in rollout.precisions or set(rollout.precisions) == {"none"}:
        raise ConfigError(
            f"rollout.precision_tail={rollout.precision_tail} needs engines with and without quantization; let "
            "rollout.quantization list both, such as [int8, none], or set precision_tail to 0."
        )
    if rollout.verify != "coupled":
        raise ConfigError(
            "rollout.precision_tail goes on with a response's noise in another engine, which rollout.verify="
            f"{rollout.verify} does not know; use coupled, or set precision_tail to 0."
        )
    for name in ("presence_penalty", "frequency_penalty"):
        if name in rollout.sampling:
            raise ConfigError(
                f"rollout.sampling.{name} counts the tokens that one engine has generated, so it does not go with "
                "rollout.precision_tail; leave out one of them."
            )


def _check_sleep(rollout: "Rollout") -> None:
    if rollout.sleep and rollout.placement != "colocated":
        raise ConfigError(
            f"rollout.sleep={rollout.sleep} makes room for a trainer on the same devices, but rollout.placement="
            f"{rollout.placement}; set sleep to 0."
        )
    if rollout.sleep == 2 and rollout.speculation.uses_head:
        raise ConfigError(
            "rollout.sleep=2 would drop the weights of the EAGLE head, which a sync does not bring; set it to 1, or "
            "leave eagle out of rollout.speculation.drafters."
        )


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


def read_hf_config(path: str) -> dict[str, Any]:
    """The model's `config.json` as a dict.

    Raises:
        ConfigError: when the folder or file is missing or is not JSON.
    """
    file = Path(path) / "config.json"
    if not Path(path).is_dir():
        raise ConfigError(
            f"model.path={path!r} is not a folder; give a folder with a Hugging Face model, or make one with "
            "`megatron-rl sft`."
        )
    try:
        content: dict[str, Any] = json.loads(file.read_text())
    except FileNotFoundError:
        raise ConfigError(f"model.path={path!r} has no config.json; it must hold a Hugging Face model.") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{file} is not valid JSON ({error}).") from None
    return content


def check_layout(config: "Config", hf: dict[str, Any], world_size: int | None = None) -> None:
    """Does the model fit the layout? `hf` is the model's `config.json`; `world_size` the number of trainer processes.

    Raises:
        ConfigError: naming the keys and the remedy.
    """
    architecture = (hf.get("architectures") or ["?"])[0]
    if architecture not in SUPPORTED_ARCHITECTURES:
        raise ConfigError(
            f"model.path={config.model.path!r} is a {architecture}; supported are {', '.join(SUPPORTED_ARCHITECTURES)}."
        )
    heads = hf["num_attention_heads"]
    kv_heads = hf.get("num_key_value_heads", heads)
    layers = hf["num_hidden_layers"]
    tp, pp = config.parallel.tp_size, config.parallel.pp_size
    for name, count in (("num_attention_heads", heads), ("num_key_value_heads", kv_heads)):
        if count % tp:
            raise ConfigError(
                f"parallel.tp_size={tp} does not divide the model's {name}={count}; choose a divisor of {count}."
            )
    if architecture != MIXTURE and hf["intermediate_size"] % tp:
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
    longest = config.data.max_prompt_tokens + config.rollout.max_tokens
    if longest > hf.get("max_position_embeddings", longest):
        raise ConfigError(
            f"data.max_prompt_tokens + rollout.max_tokens = {longest} exceeds the model's "
            f"max_position_embeddings={hf['max_position_embeddings']}; lower one of them."
        )
    skip_patterns(config.rollout.quantization_skip, layers)
    check_experts(config, hf)
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
    per_minibatch = config.train.prompts_per_step // config.train.minibatches
    if per_minibatch * config.algorithm.group_size < dp:
        raise ConfigError(
            f"a mini-batch of {per_minibatch} prompts x {config.algorithm.group_size} samples cannot be split over "
            f"{dp} data-parallel ranks; raise train.prompts_per_step."
        )
