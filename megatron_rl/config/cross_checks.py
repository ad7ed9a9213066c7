"""Checks across keys, without a look at the model. Each takes the sections that it compares."""

import math

from megatron_rl.config.algorithm import AlgorithmConfig, CorrectionConfig
from megatron_rl.config.errors import ConfigError
from megatron_rl.config.heldout_sets import KINDS, PUBLIC_SETS, set_name, split_best
from megatron_rl.config.rollout import RolloutConfig
from megatron_rl.config.sections import (
    DataConfig,
    DrafterConfig,
    EvalConfig,
    ModelConfig,
    ParallelConfig,
    RewardConfig,
    TrainConfig,
)

MIN_NUMBERS = 100
"""With fewer numbers to choose from, training and held-out problems would be too few to tell apart."""


def check_training(train: TrainConfig, algorithm: AlgorithmConfig, parallel: ParallelConfig) -> None:
    """Do the sizes of a step fit together?

    Raises:
        ConfigError: naming the keys and the remedy.
    """
    if train.prompts_per_step % train.num_minibatches:
        raise ConfigError(
            f"train.prompts_per_step={train.prompts_per_step} is not divisible by "
            f"train.num_minibatches={train.num_minibatches}; change one of them."
        )
    if parallel.sequence_parallel and parallel.tp_size == 1:
        raise ConfigError("parallel.sequence_parallel=true needs parallel.tp_size > 1; set it to false.")
    if (warmup := algorithm.critic.warmup_steps) >= train.steps:
        raise ConfigError(
            f"algorithm.critic.warmup_steps={warmup} leaves none of train.steps={train.steps} for the policy; lower it."
        )


def check_lengths(data: DataConfig, train: TrainConfig, rollout: RolloutConfig, reward: RewardConfig) -> None:
    """Do prompts and responses fit into a micro-batch, and does a length penalty begin before the limit?

    Raises:
        ConfigError: naming the keys and the remedy.
    """
    longest = data.max_prompt_tokens + rollout.max_tokens
    if longest > train.tokens_per_microbatch:
        raise ConfigError(
            f"train.tokens_per_microbatch={train.tokens_per_microbatch} is smaller than the longest sequence, "
            f"data.max_prompt_tokens + rollout.max_tokens = {longest}; raise it to at least {longest}."
        )
    penalty = reward.length_penalty
    if penalty is not None and penalty.start >= rollout.max_tokens:
        raise ConfigError(
            f"reward.length_penalty.start={penalty.start} must be smaller than rollout.max_tokens={rollout.max_tokens}."
        )


def check_rollout(rollout: RolloutConfig, model: ModelConfig, algorithm: AlgorithmConfig) -> None:
    """Do the engines' options go together, and with the algorithm?

    Raises:
        ConfigError: naming the keys and the remedy.
    """
    _check_quantization(rollout, model)
    _check_sleep(rollout)
    _check_history(rollout)
    if algorithm.dynamic_sampling and rollout.precision_tail:
        raise ConfigError(
            f"algorithm.dynamic_sampling={algorithm.dynamic_sampling} adds prompts while the engines generate, "
            "but rollout.precision_tail has to know their number before; set one of them to 0."
        )


def check_arithmetic(data: DataConfig) -> None:
    """Are there enough built-in problems?

    Raises:
        ConfigError: naming the keys and the remedy.
    """
    arithmetic = data.arithmetic
    if arithmetic.min_doublings > arithmetic.max_doublings:
        raise ConfigError("data.arithmetic.min_doublings must not be larger than data.arithmetic.max_doublings.")
    if 10**arithmetic.digits >> arithmetic.max_doublings < MIN_NUMBERS:
        raise ConfigError(
            f"data.arithmetic.digits={arithmetic.digits} leaves fewer than {MIN_NUMBERS} numbers to double "
            f"data.arithmetic.max_doublings={arithmetic.max_doublings} times; raise the first or lower the second."
        )


def check_drafter(parallel: ParallelConfig) -> None:
    """Can an EAGLE head learn from this trainer's policy?

    Raises:
        ConfigError: naming the key and the remedy.
    """
    if parallel.cp_size > 1:
        raise ConfigError(
            f"parallel.cp_size={parallel.cp_size} deals the tokens that an EAGLE head would learn from to "
            "several devices, which is not supported; set it to 1, or leave eagle out of rollout.speculation.drafters."
        )


def check_correction(correction: CorrectionConfig) -> None:
    """Do the keys of the mismatch correction go together?

    Raises:
        ConfigError: naming the keys and the remedy.
    """
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


def _check_history(rollout: RolloutConfig) -> None:
    history, sampler = rollout.history, rollout.sampler
    if history.mode != "off" and sampler != "coupled":
        raise ConfigError(
            f"rollout.history.mode={history.mode} needs rollout.sampler=coupled, not {sampler}; set one of them to its "
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
            f"rollout.history.lenience={history.lenience} is not finite, so rollout.history.budget cannot start from "
            "it; set it to a finite number such as 0.5."
        )


def _check_quantization(rollout: RolloutConfig, model: ModelConfig) -> None:
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
        if precision != "int8" and model.precision == "fp32":
            raise ConfigError(
                f"rollout.quantization={precision} needs bf16 activations, but model.precision=fp32; use bf16."
            )


def _check_fleet(rollout: RolloutConfig) -> None:
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
    if rollout.sampler != "coupled":
        raise ConfigError(
            "rollout.precision_tail continues a response with its noise in another engine, which rollout.sampler="
            f"{rollout.sampler} does not know; use coupled, or set precision_tail to 0."
        )
    for name in ("presence_penalty", "frequency_penalty"):
        if name in rollout.sampling:
            raise ConfigError(
                f"rollout.sampling.{name} counts the tokens that one engine has generated, so it does not go with "
                "rollout.precision_tail; leave out one of them."
            )


def _check_sleep(rollout: RolloutConfig) -> None:
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


def check_evaluation(data: DataConfig, evaluation: EvalConfig) -> None:
    """Do `data.eval`, `data.templates` and `eval.*` fit together?

    Raises:
        ConfigError: naming the keys and the remedy.
    """
    names = [set_name(spec) for spec in data.eval]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"data.eval names {twice!r} twice; leave one of them out.")
    for name, template in data.templates.items():
        if name not in PUBLIC_SETS:
            raise ConfigError(
                f"data.templates.{name} is for no public set; they are {', '.join(PUBLIC_SETS)}. Other sets hold whole "
                "prompts."
            )
        if "{problem}" not in template:
            raise ConfigError(f"data.templates.{name}={template!r} has no {{problem}}, where the problem goes.")
    for name in evaluation.schedule:
        if name not in names:
            raise ConfigError(f"eval.schedule.{name} is for no set of data.eval; it has {', '.join(names) or 'none'}.")
    if evaluation.best is not None:
        _check_best(evaluation.best, names, evaluation.samples)


def _check_best(best: str, names: list[str], samples: int) -> None:
    name, kind = split_best(best)
    if kind not in KINDS:
        raise ConfigError(f"eval.best={best!r} must be KIND or SET/KIND, where KIND is one of {', '.join(KINDS)}.")
    if not names or (name is not None and name not in names):
        raise ConfigError(f"eval.best={best!r} is of no set of data.eval; it has {', '.join(names) or 'none'}.")
    if kind != "greedy_accuracy" and not samples:
        raise ConfigError(f"eval.best={best!r} needs sampled responses; set eval.samples, or use greedy_accuracy.")


def check_overlap(rollout: RolloutConfig, algorithm: AlgorithmConfig, drafter: DrafterConfig) -> None:
    """What `rollout.async_steps` and `rollout.partial` do not go with.

    Raises:
        ConfigError: naming the keys and the remedy.
    """
    setting = rollout.overlap_setting
    if setting is None:
        return
    if algorithm.dynamic_sampling:
        raise ConfigError(
            f"{setting} has more prompts in progress than a step needs, so algorithm.dynamic_sampling="
            f"{algorithm.dynamic_sampling} cannot choose among those of one step; set one of them to its "
            "default (algorithm.dynamic_sampling=0)."
        )
    if rollout.history.mode != "off":
        raise ConfigError(
            f"{setting} samples a response with several policies, which rollout.history.mode={rollout.history.mode} "
            "cannot compare it with later; set mode to off."
        )
    if rollout.precision_tail or len(set(rollout.precisions)) > 1:
        raise ConfigError(
            f"{setting} needs engines of one precision, because a response may continue in any of them; let "
            f"rollout.quantization={rollout.quantization} be a single value."
        )
    _check_sampling(rollout, setting)
    if rollout.speculation.uses_head and "tails" in drafter.fill:
        raise ConfigError(
            f"{setting} does not wait for the tails of generation, which drafter.fill={drafter.fill} would "
            "fill; leave tails out of it."
        )
    if rollout.async_steps and rollout.sleep:
        raise ConfigError(
            f"{setting} generates while the trainer works, but rollout.sleep={rollout.sleep} gives the engines' memory "
            "to it; set one of them to 0."
        )


def _check_sampling(rollout: RolloutConfig, setting: str) -> None:
    if rollout.sampler != "coupled":
        raise ConfigError(
            f"{setting} continues a response with its noise after new weights, which rollout.sampler={rollout.sampler} "
            "does not know; set it to coupled."
        )
    for name in ("presence_penalty", "frequency_penalty"):
        if name in rollout.sampling:
            raise ConfigError(
                f"{setting} begins a response again where it was stopped, and rollout.sampling.{name} counts the "
                "tokens since then only; leave out one of them."
            )
