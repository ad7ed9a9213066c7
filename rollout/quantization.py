"""How vLLM is told which weights to quantize; `rollout.online_quantization` is what then runs in its workers.

The settings travel where those of a quantized checkpoint would, in the model's configuration, so that each of vLLM's
processes has them.
"""

from typing import Any

from megatron_rl.config import Config
from megatron_rl.config.layout import read_hf_config
from megatron_rl.config.quantization import skip_patterns

METHOD = "megatron_rl"  # name in vLLM's quantization registry


def quantization_arguments(config: Config, engine: int, model_path: str, dtype: str) -> dict[str, Any]:
    """Arguments of vLLM's `EngineArgs` for the engine's entry of `rollout.quantization` and for `rollout.lm_head_fp32`.

    Empty when both are off. `dtype` is that of the engine's activations; an output layer is float32 anyway in a float32
    engine. Raises ConfigError for a wrong entry in `rollout.quantization_skip`.
    """
    rollout = config.rollout
    precision = rollout.precisions[engine]
    lm_head_fp32 = rollout.lm_head_fp32 and dtype != "float32"
    if precision == "none" and not lm_head_fp32:
        return {}
    settings = {
        "quant_method": METHOD,
        "kind": precision,
        "skip": skip_patterns(rollout.quantization_skip, int(read_hf_config(model_path)["num_hidden_layers"])),
        "lm_head_fp32": lm_head_fp32,
    }
    overrides = rollout.vllm.get("hf_overrides", {}) | {"quantization_config": settings}
    return {"quantization": METHOD, "hf_overrides": overrides}
