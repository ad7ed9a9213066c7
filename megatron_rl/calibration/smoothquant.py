"""Which smoothing and clipping suit a linear layer that int8 engines run, from the inputs that it gets.

SmoothQuant (Xiao et al. 2022, equation 4) divides input channel j of the activations by
`s_j = max|x_j|^alpha / max|w_j|^(1 - alpha)` and multiplies the weight's by it. Here alpha is chosen layer by layer,
and then how far the largest weights of an output channel are cut: each by the error of the layer's output, computed as
the engines compute it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, Int8
from torch import Tensor

from rollout.quantization.int8 import Rounding, quantized, reference_linear, rounding_sums

ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
_NOISE = 0.05
"""A checkpoint's factors that stay this close to 1 come from rounding, not from smoothing."""


@dataclass(frozen=True)
class Settings:
    """How a layer is to be quantized."""

    smoothing: Float32[Tensor, " in"] | None
    """What input channels are divided by; None: nothing."""
    clip: float
    """Share of an output channel's largest weight at which weights are cut off; 1: nowhere."""
    alpha: float | None
    """Of the formula above; None without smoothing, and with one that a checkpoint has."""


@dataclass(frozen=True)
class Losses:
    """What int8 does to a layer with given settings."""

    error: float
    """Norm of the output's error by the norm of the output, over all rows."""
    clipped: float
    """Share of the weights that are clipped, in [0, 1]."""
    flushed: float
    """Share of the activations that are not 0 and become 0: what outliers do to the others, as a token's scale follows
    its largest activation. Activations are never clipped."""


def smoothing_vector(
    activation_max: Float32[Tensor, " in"], weight_max: Float32[Tensor, " in"], alpha: float
) -> Float32[Tensor, " in"]:
    """s of the formula above, scaled to a geometric mean of 1; inputs that are always 0, or unused, count as such."""
    live = (activation_max > 0) & (weight_max > 0)
    logs = alpha * activation_max.log() - (1 - alpha) * weight_max.log()
    logs = torch.where(live, logs, 0.0)
    mean = logs.sum() / live.sum().clamp(min=1)
    return torch.where(live, (logs - mean).exp(), 1.0)


def losses(rows: Float[Tensor, "rows in"], weight: Float[Tensor, "out in"], settings: Settings) -> Losses:
    """Compare the products of `rows` in int8 with those in float32."""
    x, smoothing = rows.float(), settings.smoothing
    exact = x @ weight.float().T
    product = reference_linear(x, weight, None, smoothing, settings.clip)
    activations, _ = quantized(x, None if smoothing is None else smoothing.reciprocal())
    rounding = rounding_sums(weight, *quantized(weight, smoothing, settings.clip), smoothing)
    return Losses(
        error=((product - exact).norm() / exact.norm().clamp(min=1e-30)).item(),
        clipped=Rounding.of(rounding, weight.numel()).clipped,
        flushed=((activations == 0) & (x != 0)).float().mean().item(),
    )


def search(
    rows: Float[Tensor, "rows in"], weight: Float[Tensor, "out in"], activation_max: Float32[Tensor, " in"]
) -> Settings:
    """The settings with the smallest error: first the smoothing without clipping, then the clipping with it."""
    weight_max = weight.float().abs().amax(0)
    smoothings = [Settings(None, 1.0, None)]
    smoothings += [Settings(smoothing_vector(activation_max, weight_max, alpha), 1.0, alpha) for alpha in ALPHAS]
    best = min(smoothings, key=lambda settings: losses(rows, weight, settings).error)
    clips = [Settings(best.smoothing, clip, best.alpha) for clip in CLIPS]
    return min(clips, key=lambda settings: losses(rows, weight, settings).error)


def from_checkpoint(
    weight: Float[Tensor, "out in"],
    levels: Int8[Tensor, "out in"],
    scales: Float[Tensor, " out"],
    norms: tuple[Float[Tensor, " in"], Float[Tensor, " in"]] | None,
) -> Settings:
    """The settings that a quantized checkpoint was made with.

    Args:
        weight: of the unquantized model.
        levels: the same in the checkpoint, in int8.
        scales: of the checkpoint's output channels.
        norms: the weight of the norm in front of the layer, unquantized and in the checkpoint, which holds the inverse
            of the smoothing; None for a layer without one, whose columns are compared instead.
    """
    whole = levels.abs() < 127  # not clipped
    weight = weight.float()
    stored = levels.float() * scales.float()[:, None]
    if norms is not None:
        ours, theirs = (norm.float() for norm in norms)
        smoothing = torch.where((ours != 0) & (theirs != 0), ours / theirs, 1.0)
    else:
        smoothing = _factors(stored, weight, whole, dim=0)
        # The standard deviation that rounding, by a step / sqrt(12), gives the factor: large for small columns.
        blur = (weight * scales.float()[:, None]).norm(dim=0) / 12**0.5 / (weight * weight).sum(0).clamp(min=1e-30)
        clear = (smoothing > 0) & ((smoothing - 1).abs() > 5 * blur)
        smoothing = torch.where(clear, smoothing, 1.0)
    smooths = bool(((smoothing - 1).abs() > _NOISE).any())
    smoothed = weight * smoothing if smooths else weight
    # A layer that feeds a smoothed one has rows that are scaled as a whole.
    largest = smoothed.abs().amax(1) * _factors(stored, smoothed, whole, dim=1).abs()
    ratios = (127 * scales.float() / largest.clamp(min=1e-30))[largest > 0]
    found = ratios.median().item() if len(ratios) else 1.0
    return Settings(smoothing if smooths else None, min(CLIPS, key=lambda clip: abs(clip - found)), None)


def _factors(stored: Tensor, weight: Tensor, whole: Tensor, dim: int) -> Tensor:
    """By how much `stored` is larger than `weight` in each column (`dim` 0) or row (1), by least squares."""
    return (stored * weight * whole).sum(dim) / (weight * weight * whole).sum(dim).clamp(min=1e-30)


FUSED: Mapping[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}


def layer_name(projection: str) -> str:
    """vLLM's name of the layer that a projection belongs to: `model.layers.0.self_attn.qkv_proj` for `...q_proj`."""
    parent, _, own = projection.rpartition(".")
    return f"{parent}.{next((name for name, parts in FUSED.items() if own in parts), own)}"
