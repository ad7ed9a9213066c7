"""Linear layers in W8A8 on the CPU: native operators (csrc/int8_cpu.cpp) and their reference in PyTorch.

Weights have one scale per output channel, activations one per row, both symmetric: `amax / 127`. Sums of products are
exact in int32, so a row's result depends neither on the other rows nor on the threads.

Smoothing (SmoothQuant, Xiao et al. 2022) divides input channel j of the activations by s_j and multiplies that of the
weight by it: the product stays the same, and outliers of the activations move into the weight, where each output
channel has a scale of its own. Clipping cuts the largest weights of a channel, so that the others have finer steps.

vLLM's own kernel, oneDNN, computes the same, but packs into memory of its own, at another address for every new weight,
which takes almost three times as long as for a bf16 weight. Here packing writes into given tensors.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Float32, Int8, Int32
from torch import Tensor

from rollout.native import load_operators

load_operators(Path(__file__).with_name("_int8.so"))

_CHANNELS = 64
"""Output channels are padded to a multiple of it."""
_QUAD = 4
"""Inputs are padded to a multiple of it."""


class Rounding(NamedTuple):
    """What quantization does to a weight."""

    error: float
    """Norm of the difference by the norm of the (smoothed) weight."""
    clipped: float
    """Fraction of the elements that are clipped, 0 to 1."""

    @staticmethod
    def of(sums: Float[Tensor, "3"], elements: int) -> "Rounding":
        """From the squares of the differences, the squares of the weights, and the number of clipped elements."""
        error, norm, clipped = sums.tolist()
        return Rounding((error / norm) ** 0.5 if norm else 0.0, clipped / elements)


@dataclass(frozen=True)
class PackedWeight:
    """An [out, in] weight as `linear` reads it."""

    packed: Int8[Tensor, "bytes"]
    scales: Float32[Tensor, "out"]
    sums: Int32[Tensor, "out"]
    """Of each channel's int8 weights."""
    factors: Float32[Tensor, "in"] | None = None
    """The activations are multiplied with these first: 1 / smoothing."""

    @staticmethod
    def empty(channels: int, inputs: int) -> "PackedWeight":
        """Uninitialised memory for a weight of that size."""
        size = -(-channels // _CHANNELS) * _CHANNELS * (-(-inputs // _QUAD) * _QUAD)
        return PackedWeight(
            torch.empty(size, dtype=torch.int8),
            torch.empty(channels, dtype=torch.float32),
            torch.empty(channels, dtype=torch.int32),
        )

    def fill(
        self, weight: Float[Tensor, "out in"], smoothing: Float32[Tensor, "in"] | None = None, clip: float = 1.0
    ) -> Rounding:
        """Quantize weights into this memory.

        Args:
            weight: float32 or bfloat16.
            smoothing: multiplied with the inputs' weights first.
            clip: weights of a channel beyond this fraction of its largest one are clipped to it.

        Raises:
            ValueError: the weights do not fit into the memory, or the CPU lacks AVX-512 VNNI.
        """
        blocks = torch.ops.megatron_rl.int8_pack(weight, self.packed, self.scales, self.sums, smoothing, clip)
        return Rounding.of(blocks.sum(0), weight.numel())


def linear(
    x: Float[Tensor, "rows in"], weight: PackedWeight, bias: Float32[Tensor, "out"] | None
) -> Float[Tensor, "rows out"]:
    """x times the weight, plus bias, in the dtype of x.

    Args:
        x: float32 or bfloat16; each row is contiguous, the row stride is free.
        weight: quantized and packed.
        bias: added to the product.

    Raises:
        ValueError: the sizes do not fit, or the CPU lacks AVX-512 VNNI.
    """
    result: Tensor = torch.ops.megatron_rl.int8_linear(
        x, weight.packed, weight.scales, weight.sums, bias, weight.factors
    )
    return result


def reference_linear(
    x: Float[Tensor, "rows in"],
    weight: Float[Tensor, "out in"],
    bias: Float32[Tensor, "out"] | None,
    smoothing: Float32[Tensor, "in"] | None = None,
    clip: float = 1.0,
) -> Float[Tensor, "rows out"]:
    """What `PackedWeight.fill` and `linear` compute together, bit by bit; `PackedWeight.factors` is 1 / `smoothing`."""
    factors = None if smoothing is None else smoothing.reciprocal()
    (a, a_scale), (b, b_scale) = quantized(x, factors), quantized(weight, smoothing, clip)
    sums = (a.double() @ b.double().T).float()  # exact, then rounded once
    product = (sums * b_scale[None, :]) * a_scale[:, None]
    return (product if bias is None else product + bias).to(x.dtype)


def rounding_sums(
    weight: Float[Tensor, "out in"],
    levels: Float32[Tensor, "out in"],
    scales: Float32[Tensor, "out"],
    smoothing: Float32[Tensor, "in"] | None,
) -> Float[Tensor, "3"]:
    """What `quantized` has done to a weight, or to some of its rows, as `Rounding.of` takes it; float64."""
    wide = weight.float() if smoothing is None else weight.float() * smoothing
    limits = 127 * scales[:, None]
    differences = levels * scales[:, None] - wide
    clipped = (wide.abs() > limits * (1 + 1e-6)).sum()  # a largest weight may be off by a bit
    return torch.stack([differences.double().square().sum(), wide.double().square().sum(), clipped.double()])


def quantized(
    rows: Float[Tensor, "rows in"], factors: Float32[Tensor, "in"] | None = None, clip: float = 1.0
) -> tuple[Float32[Tensor, "rows in"], Float32[Tensor, "rows"]]:
    """Rows times `factors`, as whole numbers up to 127 and one scale each."""
    wide = rows.float() if factors is None else rows.float() * factors
    largest = wide.abs().amax(1) * clip
    # `127 / largest` would be 127 times the reciprocal, which is rounded twice.
    inverse = torch.where(largest > 0, torch.full_like(largest, 127) / largest, 0.0)
    return (wide * inverse[:, None]).round().clamp(-127, 127), largest / 127


@torch.library.register_fake("megatron_rl::int8_linear")
def _shape(
    x: Tensor, packed: Tensor, scales: Tensor, sums: Tensor, bias: Tensor | None, factors: Tensor | None
) -> Tensor:
    return x.new_empty(x.shape[0], scales.shape[0])  # `len` would fix the number of rows for good
