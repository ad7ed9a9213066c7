"""What vLLM is started with: the arguments of an engine of the fleet."""

from dataclasses import dataclass
from typing import Any

from megatron_rl.config import Config
from megatron_rl.config.model_fit import read_hf_config
from rollout.engine.vllm_options import check_sampling_options, check_vllm_options
from rollout.quantization.quantization_settings import quantization_arguments
from rollout.speculation.eagle import head_arguments
from rollout.speculation.speculation_settings import SpeculationSettings


@dataclass(frozen=True)
class EngineEnvironment:
    """What an engine needs to know of the machine; filled in by the program that knows it."""

    env: dict[str, str]
    """Environment variables of the engine's process."""
    gpus: float
    """GPUs that Ray sets aside for one engine; 0 on CPU."""
    dtype: str
    """vLLM's name of a dtype, e.g. "float32"."""
    weight_sync: str
    """shm | ipc | nccl."""
    vocab_limit: int
    """Token ids from this one on are never sampled: the tokenizer does not know them."""
    end_ids: tuple[int, ...]
    """Token ids that end a response."""
    vllm: dict[str, Any]
    """vLLM options that suit the machine; those of `rollout.vllm` take precedence."""
    shared_gpus: tuple[str, ...] = ()
    """Ids of a node's GPUs that engines share with the trainer, see `rollout.fleet.placement`."""


def engine_arguments(
    config: Config,
    environment: EngineEnvironment,
    model_path: str,
    drafter_path: str | None = None,
    engine: int = 0,
) -> dict[str, Any]:
    """The arguments of vLLM's `EngineArgs` for an engine of the fleet.

    Args:
        config: the experiment.
        environment: the machine.
        model_path: folder of the policy, in the Hugging Face format.
        drafter_path: folder of an EAGLE head; None: `drafter.path`.
        engine: its index in the fleet.

    Raises:
        ConfigError: see `check_vllm_options`, `check_sampling_options`, `head_arguments` and `quantization_arguments`.
    """
    check_vllm_options(config.rollout.vllm)
    check_sampling_options(config.rollout.sampling)
    arguments: dict[str, Any] = {
        "max_model_len": config.data.max_prompt_tokens + config.rollout.max_tokens,
        "disable_log_stats": True,
        **environment.vllm,
        **config.rollout.vllm,
        "model": model_path,
        "dtype": environment.dtype,
        "tensor_parallel_size": config.rollout.tp_size,
        "skip_tokenizer_init": True,
        "logprobs_mode": "processed_logprobs",
        "weight_transfer_config": {"backend": environment.weight_sync},
        "worker_extension_cls": "rollout.engine.worker.WorkerExtension",
    }
    if config.rollout.tp_size > 1:
        # In a Ray actor vLLM would place its workers through Ray; as children they die with the actor.
        arguments["distributed_executor_backend"] = "mp"
    if read_hf_config(model_path, config.model.family).get("quantization_config"):
        # The trainer reads quantized files as numbers, and sends those.
        overrides = config.rollout.vllm.get("hf_overrides", {}) | {"quantization_config": None}
        arguments["hf_overrides"] = overrides
    arguments |= quantization_arguments(config, engine, model_path, environment.dtype)
    return arguments | _speculation_arguments(config, drafter_path)


def _speculation_arguments(config: Config, drafter_path: str | None) -> dict[str, Any]:
    settings = SpeculationSettings.from_config(config)
    if settings is None:
        return {}
    drafter = {"method": "custom_class", "model": "rollout.speculation.no_drafts.NoDrafts"}
    if settings.uses_head:
        drafter = head_arguments(config, drafter_path)
    return {
        "speculative_config": drafter | {"num_speculative_tokens": settings.longest_draft},
        "scheduler_cls": "rollout.speculation.scheduler.SpeculativeScheduler",
        "async_scheduling": False,
        "additional_config": settings.to_vllm(),
    }
