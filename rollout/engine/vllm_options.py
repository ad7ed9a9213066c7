"""Which of vLLM's own options `rollout.vllm` and `rollout.sampling` may have."""

import dataclasses
import difflib
from typing import Any

from megatron_rl.config import ConfigError

# Options of vLLM that follow from keys of ours, or on which this package relies -> the remedy in the message.
_RESERVED = {
    "model": "set model.path",
    "tensor_parallel_size": "set rollout.tp_size",
    "weight_transfer_config": "set rollout.weight_sync",
    "worker_extension_cls": "it is used by the engine itself",
    "logprobs_mode": "it is always processed_logprobs",
    "skip_tokenizer_init": "requests carry token ids, so it is always true",
    "generation_config": "sampling follows from rollout.temperature alone",
    "pipeline_parallel_size": "engines are split by rollout.tp_size alone",
    "quantization": "set rollout.quantization",
    "quantization_config": "set rollout.quantization and rollout.quantization_skip",
    "enable_sleep_mode": "set rollout.sleep",
    "speculative_config": "set rollout.speculation or rollout.history",
    "scheduler_cls": "it is used for rollout.speculation and rollout.history",
    "additional_config": "it is used for rollout.speculation and rollout.history",
    "async_scheduling": "drafts are made between steps, so it is off with rollout.speculation and rollout.history",
}


def check_vllm_options(options: dict[str, Any]) -> None:
    """Check the names in `rollout.vllm`.

    Raises:
        ConfigError: a name is not an option of vLLM, or must not be set there.
    """
    from vllm import EngineArgs

    known = {field.name for field in dataclasses.fields(EngineArgs)}
    for name in options:
        if name in _RESERVED:
            raise ConfigError(f"rollout.vllm.{name} cannot be set: {_RESERVED[name]}.")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else "the names are those of vLLM's EngineArgs."
            raise ConfigError(f"rollout.vllm.{name} is no option of vLLM's engine; {hint}")


def check_sampling_options(options: dict[str, Any]) -> None:
    """Check the names and values in `rollout.sampling`.

    Raises:
        ConfigError: vLLM or coupled sampling does not support a name, or vLLM refuses a value.
    """
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    from rollout.sampling.logit_constraints import SUPPORTED

    for name in options:
        if name not in SUPPORTED:
            close = difflib.get_close_matches(name, SUPPORTED, n=1)
            hint = f"did you mean {close[0]}?" if close else f"it takes {', '.join(SUPPORTED)}."
            raise ConfigError(f"rollout.sampling.{name} is not supported; {hint}")
    if "bad_words" in options:
        raise ConfigError(
            "rollout.sampling.bad_words needs a tokenizer in the engine, which gets token ids; leave it out."
        )
    try:
        SamplingParams(**options)
    except (ValueError, TypeError, VLLMValidationError) as error:
        raise ConfigError(f"vLLM refuses rollout.sampling: {error}") from None
