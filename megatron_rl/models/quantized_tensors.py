"""Weights that a model's files hold quantized: what numbers the stored ones stand for.

Two formats are read, by `quantization_config` of `config.json`: `fp8` of DeepSeek and Qwen (float8 weights with a scale
for each block of rows and columns, in `weight_scale_inv`, or one scale for the whole), and `compressed-tensors` with
int8 or float8 weights and a scale for the whole or for each output channel (`weight_scale`, and `weight_zero_point`
where it is asymmetric).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_rl.config import ConfigError

FP8, INT8 = {"F8_E4M3", "F8_E5M2"}, {"I8"}
SUFFIX = ".weight"
OF_ACTIVATIONS = (".input_scale", ".activation_scale", ".input_zero_point")
"""Scales of activations, which nothing needs once weights are numbers again."""


@dataclass(frozen=True)
class WeightDecoder:
    """How a weight is put together from its stored parts."""

    types: frozenset[str]
    """Stored dtypes of quantized weights, in the names of safetensors."""
    scale: str
    """What the name of the scale ends with, in place of `.weight`."""
    block: tuple[int, int] | None = None
    """Rows and columns that share a scale; None: a scale for all or for each row."""
    zero_point: str | None = None
    """What the name of the zero point ends with, where there may be one."""

    def decodes(self, name: str, dtype: str) -> bool:
        """Whether the tensor is stored quantized."""
        return name.endswith(SUFFIX) and dtype in self.types

    def parts(self, name: str, shapes: Mapping[str, tuple[int, ...]], file: Path) -> set[str]:
        """The stored tensors that belong to the weight `name`, itself among them.

        Args:
            name: of the weight.
            shapes: of all stored tensors.
            file: of the weight, for messages.

        Raises:
            ConfigError: when the scale is missing or has a shape that is not understood.
        """
        module = name.removesuffix(SUFFIX)
        if module + self.scale not in shapes:
            raise ConfigError(
                f"{file}: {name} is quantized, but its scale {module + self.scale} is missing; is it the whole model?"
            )
        rows, columns = shapes[name]
        stored = shapes[module + self.scale]
        allowed: list[tuple[int, ...]] = [(), (1,), (1, 1), (rows,), (rows, 1)]
        if self.block is not None:
            allowed = [(-(-rows // self.block[0]), -(-columns // self.block[1]))]
        if stored not in allowed:
            raise ConfigError(
                f"{file}: {module + self.scale} has shape {list(stored)}, which does not fit {name} of shape "
                f"{list(shapes[name])}."
            )
        others = {module + end for end in (self.scale, self.zero_point, *OF_ACTIVATIONS) if end is not None}
        return {name} | (others & set(shapes))

    def decode(self, name: str, get: Callable[[str], torch.Tensor | None]) -> torch.Tensor:
        """The weight `name`, float32 [rows, columns].

        Args:
            name: of the weight.
            get: reads a stored tensor, None where there is none.
        """
        module = name.removesuffix(SUFFIX)
        stored, scale = get(name), get(module + self.scale)
        assert stored is not None and scale is not None
        weight, scale = stored.float(), scale.float()
        zero = None if self.zero_point is None else get(module + self.zero_point)
        if zero is not None:
            weight = weight - _by_row(zero.float())
        if self.block is None:
            return weight * _by_row(scale)
        spread = scale.repeat_interleave(self.block[0], 0).repeat_interleave(self.block[1], 1)
        return weight * spread[: weight.shape[0], : weight.shape[1]]


def _by_row(values: torch.Tensor) -> torch.Tensor:
    return values.reshape(-1, 1) if values.numel() > 1 else values.reshape(1, 1)


def weight_decoder(quantization: Mapping[str, Any] | None, named: str) -> WeightDecoder | None:
    """How the weights of a model are stored; None: as they are.

    Args:
        quantization: `quantization_config` of its `config.json`, if it has one.
        named: the key and the model, for messages.

    Raises:
        ConfigError: for a format that is not read.
    """
    if not quantization:
        return None
    method = quantization.get("quant_method")
    if method == "fp8":
        block = quantization.get("weight_block_size")
        if block is not None:
            return WeightDecoder(frozenset(FP8), ".weight_scale_inv", (int(block[0]), int(block[1])))
        return WeightDecoder(frozenset(FP8), ".weight_scale")
    form = quantization.get("format")
    if method == "compressed-tensors" and form in ("int-quantized", "float-quantized", "naive-quantized"):
        if _whole_groups(quantization):
            return WeightDecoder(frozenset(FP8 | INT8), ".weight_scale", zero_point=".weight_zero_point")
        form = f"{form} in groups of columns"
    kind = f"{method} ({form})" if form else repr(method)
    raise ConfigError(
        f"{named} has a quantization_config of {kind} in its config.json, which is not read; give the model's "
        "weights in bfloat16, or as fp8 or compressed-tensors with 8 bits."
    )


def _whole_groups(quantization: Mapping[str, Any]) -> bool:
    """Whether each output channel has one scale, rather than one for every so many columns."""
    weights = [group.get("weights") or {} for group in (quantization.get("config_groups") or {}).values()]
    return all(group.get("strategy", "channel") in ("channel", "tensor") for group in weights)
