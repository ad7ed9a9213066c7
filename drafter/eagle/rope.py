"""Rotary position embedding (RoFormer, arXiv 2104.09864), the half-split form of Llama."""

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

_KINDS: dict[str, set[str]] = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {"factor", "original_max_position_embeddings"},
}
"""The parameters that each kind needs."""
_OF_YARN = {"beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"}
_COMMON = {"rope_theta", "rope_type", "type", "partial_rotary_factor"}


def parameters(hf: dict[str, Any]) -> dict[str, Any]:
    """The rotary embedding that a `config.json` of transformers 4 or 5 describes, in the names of version 5.

    Args:
        hf: the content of `config.json`.

    Raises:
        ValueError: for an embedding, or a parameter, that is not supported, and for one that is missing.
    """
    scaling, stated = hf.get("rope_scaling"), hf.get("rope_parameters")
    rope = dict(scaling or stated or {})
    rope.setdefault("rope_theta", hf.get("rope_theta", 10000.0))
    rope.setdefault("rope_type", rope.get("type") or "default")
    rope.pop("type", None)
    if scaling and stated and {**stated, **scaling} != {**scaling, **stated}:
        raise ValueError("rope_scaling and rope_parameters contradict each other; remove one of them.")
    if rope["rope_type"] == "yarn" and not rope.get("original_max_position_embeddings"):
        rope["original_max_position_embeddings"] = hf.get("max_position_embeddings")
    check(rope)
    return {key: value for key, value in rope.items() if value is not None}


def check(rope: dict[str, Any]) -> None:
    """Is this rotary embedding supported?

    Args:
        rope: by transformers' names: `rope_theta`, `rope_type`, and the parameters of the type.

    Raises:
        ValueError: when it is not, naming the parameter.
    """
    kind = rope["rope_type"]
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ValueError(f"rope_type {kind!r} is not supported; supported are {', '.join(_KINDS)}.")
    if missing := sorted(key for key in _KINDS[kind] if rope.get(key) is None):
        raise ValueError(f"the {kind} rotary embedding lacks {missing[0]}.")
    if rope.get("partial_rotary_factor", 1.0) not in (None, 1.0):
        raise ValueError(
            f"partial_rotary_factor={rope['partial_rotary_factor']} is not supported: all of a head is rotated."
        )
    allowed = _COMMON | _KINDS[kind] | (_OF_YARN if kind == "yarn" else set())
    neutral = {"factor", "original_max_position_embeddings"}  # published files keep them, and nothing reads them
    if unknown := sorted(key for key in rope if key not in allowed | neutral and rope[key] is not None):
        raise ValueError(f"{unknown[0]} of the {kind} rotary embedding is not supported.")


def attention_factor(rope: dict[str, Any]) -> float:
    """What rotated queries and keys are each multiplied by: not 1 for yarn only (arXiv 2309.00071, section 3.4).

    Args:
        rope: what `parameters` returned.
    """
    if rope["rope_type"] != "yarn":
        return 1.0
    stated, factor = rope.get("attention_factor"), float(rope["factor"])
    if stated is not None:
        return float(stated)
    scale, all_dims = rope.get("mscale"), rope.get("mscale_all_dim")

    def attention(size: float) -> float:
        return 0.1 * size * math.log(factor) + 1.0 if factor > 1 else 1.0

    return attention(scale) / attention(all_dims) if scale and all_dims else attention(1.0)


def inverse_frequencies(rope: dict[str, Any], head_dim: int) -> Float[Tensor, "half_head_dim"]:
    """float32 inverse frequencies in radians per position, with the scaling of the type applied.

    The llama3 rule is that of the Llama 3.1 release: long wavelengths are stretched by `factor`, short ones kept, those
    between interpolated. Yarn does so by the turns within the original positions.

    Args:
        rope: by transformers' names: `rope_theta`, `rope_type`, and the parameters of the type.
        head_dim: even.

    Raises:
        ValueError: for an embedding that `check` refuses.
    """
    check(rope)
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies: Tensor = 1.0 / (rope["rope_theta"] ** exponent)
    kind = rope["rope_type"]
    if kind == "default":
        return frequencies
    if kind == "linear":
        return frequencies / float(rope["factor"])
    if kind == "yarn":
        return _yarn(rope, frequencies, head_dim)
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    scaled: Tensor = frequencies * (kept + (1 - kept) / rope["factor"])
    return scaled


def _yarn(rope: dict[str, Any], frequencies: Tensor, head_dim: int) -> Tensor:
    """Yarn (arXiv 2309.00071, section 3.2): the pairs of a head are kept, interpolated, or between, by their index."""

    def pair_with(turns: float) -> float:
        """The (fractional) index of the pair that makes so many turns within the original positions."""
        positions = rope["original_max_position_embeddings"]
        return head_dim * math.log(positions / (turns * 2 * math.pi)) / (2 * math.log(rope["rope_theta"]))

    low, high = pair_with(rope.get("beta_fast") or 32), pair_with(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = max(high - low, 0.001)
    stretched = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    scaled: Tensor = frequencies * (1 - stretched) + frequencies / float(rope["factor"]) * stretched
    return scaled


def rotate(
    x: Float[Tensor, "heads seq head_dim"],
    positions: Int[Tensor, "seq"],
    frequencies: Float[Tensor, "half_head_dim"],
    factor: float = 1.0,
) -> Float[Tensor, "heads seq head_dim"]:
    """Rotate each pair (x[i], x[i + head_dim / 2]) by its position times its frequency; `factor` multiplies all."""
    angles = positions[:, None].float() * frequencies.float()
    cos, sin = (angles.cos() * factor).to(x.dtype), (angles.sin() * factor).to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
