"""Rotary position embedding (RoFormer, arXiv 2104.09864), the half-split form of Llama."""

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


def parameters(hf: dict[str, Any]) -> dict[str, Any]:
    """The rotary embedding that a `config.json` of transformers 4 or 5 describes, in the names of version 5."""
    rope = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    rope.setdefault("rope_theta", hf.get("rope_theta", 10000.0))
    rope.setdefault("rope_type", rope.pop("type", "default"))
    return rope


def inverse_frequencies(rope: dict[str, Any], head_dim: int) -> Float[Tensor, "half_head_dim"]:
    """float32 inverse frequencies in radians per position, with linear or llama3 scaling applied.

    The llama3 rule is that of the Llama 3.1 release: long wavelengths are stretched by `factor`, short ones kept, those
    between interpolated.

    Args:
        rope: by transformers' names: `rope_theta`, `rope_type`, and the parameters of the type.
        head_dim: even.

    Raises:
        ValueError: for a `rope_type` other than default, linear and llama3.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies: Tensor = 1.0 / (rope["rope_theta"] ** exponent)
    kind = rope["rope_type"]
    if kind == "default":
        return frequencies
    if kind == "linear":
        return frequencies / float(rope["factor"])
    if kind != "llama3":
        raise ValueError(f"rope_type {kind!r} is not supported; supported are default, linear and llama3.")
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    scaled: Tensor = frequencies * (kept + (1 - kept) / rope["factor"])
    return scaled


def rotate(
    x: Float[Tensor, "heads seq head_dim"],
    positions: Int[Tensor, "seq"],
    frequencies: Float[Tensor, "half_head_dim"],
) -> Float[Tensor, "heads seq head_dim"]:
    """Rotate each pair (x[i], x[i + head_dim / 2]) by its position times its frequency."""
    angles = positions[:, None].float() * frequencies.float()
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
