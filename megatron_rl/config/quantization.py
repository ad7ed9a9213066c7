"""Which layers are quantized, and how: `rollout.quantization_skip`, and the file of `megatron-rl quantize setup`."""

from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

import yaml
from pydantic import Field, PositiveFloat, ValidationError

from megatron_rl.config.errors import ConfigError
from megatron_rl.config.section import Section

PROJECTIONS = (
    *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)


def skip_patterns(entries: Iterable[str], layers: int, where: str = "rollout.quantization_skip") -> list[str]:
    """The entries as name patterns (`fnmatch`): `first:N` and `last:N` become the names of those decoder layers.

    `where` says in messages where the entries come from.

    Raises:
        ConfigError: for an entry that names none of the linear layers of a model with so many decoder layers.
    """
    patterns: list[str] = []
    for entry in entries:
        kind, _, count = entry.partition(":")
        if kind in ("first", "last"):
            if not count.isdigit() or not 1 <= int(count) <= layers:
                raise ConfigError(
                    f"{where} has {entry!r}; give a number from 1 to {layers}, the model's layers, such as first:1."
                )
            start = 0 if kind == "first" else layers - int(count)
            patterns += [f"model.layers.{start + offset}.*" for offset in range(int(count))]
            continue
        if not any(
            fnmatchcase(f"model.layers.{layer}.{name}", entry) for layer in range(layers) for name in PROJECTIONS
        ):
            raise ConfigError(
                f"{where} has {entry!r}, which names no linear layer; write first:N, last:N or a "
                "pattern such as *.down_proj or model.layers.3.*."
            )
        patterns.append(entry)
    return patterns


def is_skipped(names: list[str], patterns: list[str]) -> bool:
    """Whether one of the names matches one of the patterns."""
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


class LayerSettings(Section):
    """How one layer is quantized to int8."""

    alpha: float | None = None
    """Exponent of the smoothing, for the reader: the vector itself is among `QuantizationFile.vectors`."""
    clip: float = Field(1.0, gt=0, le=1)
    """The largest weight of each output channel becomes this share of what it is."""
    error: float | None = None
    """Relative error of the layer's output that was measured with these settings, for the reader."""
    skip: str | None = None
    """Why the layer keeps the engine's precision; null: it is quantized."""


class QuantizationFile(Section):
    """What `megatron-rl quantize setup` writes, `rollout.quantization_profile` and `FLASHRL_CONFIG` name."""

    quantization: Literal["int8", "fp8", "fp8_channel", "fp8_block"]
    """As `rollout.quantization`; the keys from `vectors` on are for int8 alone."""
    skip: list[str] = Field(default_factory=list)
    """As `rollout.quantization_skip`, whose entries come on top."""
    max_error: PositiveFloat | None = None
    """The bound by which layers were left out, for the reader."""
    vectors: str | None = None
    """File beside this one with the smoothing vectors, by the names of layers; a layer without one is not smoothed."""
    layers: dict[str, LayerSettings] = Field(default_factory=dict)
    """By the layers' names in vLLM, such as `model.layers.0.self_attn.qkv_proj`. Empty: no calibration; otherwise every
    layer that is quantized has to be there."""


def read_quantization_file(path: str | Path) -> QuantizationFile:
    """Read and check such a file.

    Raises:
        ConfigError: when there is no file, or one that is not as described above.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(
            f"The quantization file {path} cannot be read ({type(error).__name__}); make one with "
            "`megatron-rl quantize setup`."
        ) from None
    try:
        return QuantizationFile.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ConfigError(
            f"The quantization file {path} is not valid: {place}: {first['msg']}; make it anew with `megatron-rl "
            "quantize setup`."
        ) from None
