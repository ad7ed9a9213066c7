"""How vLLM is told which weights to quantize; `rollout.quantization.online` is what then runs in its workers.

The settings travel where those of a quantized checkpoint would, in the model's configuration, so that each of vLLM's
processes has them.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_rl.config import Config
from megatron_rl.config.model_fit import read_hf_config
from megatron_rl.config.quantization import read_quantization_file, skip_patterns

METHOD = "megatron_rl"  # name in vLLM's quantization registry


def quantization_arguments(config: Config, engine: int, model_path: str, dtype: str) -> dict[str, Any]:
    """Arguments of vLLM's `EngineArgs` for the engine's entry of `rollout.quantization` and for `rollout.lm_head_fp32`.

    Empty when both are off. `dtype` is that of the engine's activations; an output layer is float32 anyway in a float32
    engine. Raises ConfigError for a wrong entry in `rollout.quantization_skip` and a wrong
    `rollout.quantization_profile`, which the engines of its precision follow.
    """
    rollout = config.rollout
    precision = rollout.precisions[engine]
    lm_head_fp32 = rollout.lm_head_fp32 and dtype != "float32"
    if precision == "none" and not lm_head_fp32:
        return {}
    layers = int(read_hf_config(model_path, config.model.family)["num_hidden_layers"])
    profile = rollout.quantization_profile
    if profile is not None and read_quantization_file(profile).quantization != precision:
        profile = None  # it is for other engines of a mixed fleet
    settings = method_settings(precision, layers, rollout.quantization_skip, profile, lm_head_fp32)
    overrides = rollout.vllm.get("hf_overrides", {}) | {"quantization_config": settings}
    return {"quantization": METHOD, "hf_overrides": overrides}


def method_settings(
    kind: str, layers: int, skip: Sequence[str], profile: str | None, lm_head_fp32: bool
) -> dict[str, Any]:
    """The `quantization_config` that `RolloutQuantization` reads, for a model with so many decoder layers.

    `kind`, `skip` and `profile` are as the keys of `rollout`. Raises ConfigError as `quantization_arguments` does.
    """
    patterns = skip_patterns(skip, layers)
    settings = {"quant_method": METHOD, "kind": kind, "lm_head_fp32": lm_head_fp32, "profile": None}
    if profile is not None:
        stored = read_quantization_file(profile)
        patterns += skip_patterns(stored.skip, layers, f"The key skip of {profile}")
        # The content is named as well, because vLLM keeps compiled code by these settings.
        content = hashlib.sha256(Path(profile).read_bytes()).hexdigest()
        settings |= {"profile": str(Path(profile).resolve()), "profile_sha256": content}
    return settings | {"skip": patterns}
