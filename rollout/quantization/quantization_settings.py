"""Options that make vLLM quantize weights; `rollout.quantization.online` then runs in its workers.

The settings travel in the model's configuration, like those of a quantized checkpoint, so that each of vLLM's processes
has them.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from megatron_rl.config import Config
from megatron_rl.config.model_fit import read_hf_config
from megatron_rl.config.quantization import read_quantization_file, skip_patterns

METHOD = "megatron_rl"
"""Name in vLLM's quantization registry."""


@dataclass(frozen=True)
class QuantizationSettings:
    """What one engine quantizes, and how."""

    kind: str
    """As `rollout.quantization`."""
    skip: list[str]
    """Patterns of the names of linear layers that are left as they are."""
    lm_head_fp32: bool
    """As `rollout.lm_head_fp32`."""
    profile: str | None
    """Path of the file of `rollout.quantization_profile`."""
    profile_sha256: str | None = None
    """Of its content, because vLLM keeps compiled code by these settings."""

    @classmethod
    def for_model(
        cls, kind: str, layers: int, skip: Sequence[str], profile: str | None, lm_head_fp32: bool
    ) -> "QuantizationSettings":
        """The settings for a model.

        Args:
            kind: as `rollout.quantization`.
            layers: number of decoder layers of the model.
            skip: as `rollout.quantization_skip`.
            profile: as `rollout.quantization_profile`.
            lm_head_fp32: as `rollout.lm_head_fp32`.

        Raises:
            ConfigError: an entry of `skip`, or the file `profile`, is wrong.
        """
        patterns = skip_patterns(skip, layers)
        if profile is None:
            return cls(kind, patterns, lm_head_fp32, None)
        patterns += skip_patterns(read_quantization_file(profile).skip, layers, f"The key skip of {profile}")
        content = hashlib.sha256(Path(profile).read_bytes()).hexdigest()
        return cls(kind, patterns, lm_head_fp32, str(Path(profile).resolve()), content)

    @classmethod
    def from_vllm(cls, quantization_config: Mapping[str, Any]) -> "QuantizationSettings":
        """Read what `to_vllm` returned; vLLM may have added keys of its own."""
        names = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in quantization_config.items() if name in names})

    def to_vllm(self) -> dict[str, Any]:
        """The value of `quantization_config` in the model's configuration."""
        return {"quant_method": METHOD, **asdict(self)}


def quantization_arguments(config: Config, engine: int, model_path: str, dtype: str) -> dict[str, Any]:
    """Arguments of vLLM's `EngineArgs` for the engine's entry of `rollout.quantization` and for `rollout.lm_head_fp32`.

    Empty when both are off.

    Args:
        config: the experiment.
        engine: index of the engine in the fleet.
        model_path: folder of the policy.
        dtype: of the engine's activations; in a float32 engine the output layer is float32 anyway.

    Raises:
        ConfigError: an entry of `rollout.quantization_skip`, or the file `rollout.quantization_profile`, which the
            engines of its precision follow, is wrong.
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
    settings = QuantizationSettings.for_model(precision, layers, rollout.quantization_skip, profile, lm_head_fp32)
    overrides = rollout.vllm.get("hf_overrides", {}) | {"quantization_config": settings.to_vllm()}
    return {"quantization": METHOD, "hf_overrides": overrides}
