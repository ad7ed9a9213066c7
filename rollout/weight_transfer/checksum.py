"""Checksums that prove two sides hold the same weights without either gathering a tensor.

The checksum of a Hugging Face tensor is the sum over its elements of `bits(element) * weight(flat index) mod 2**64`,
with odd pseudo-random weights. It is additive over shards, however the tensor is split; it changes with every single
flipped bit (an odd number times a power of two is never 0 mod 2**64) and, almost surely, when elements are swapped.

Zeros and subnormal numbers count as +0: the dot products of packed CPU kernels, through which an engine's weights are
read back, do not tell them apart.
"""

import math
from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Int
from torch import Tensor

PartialChecksums = dict[tuple[str, tuple[tuple[int, int], ...]], int]
"""(HF name, (start, stop) of this part along each dimension of the full tensor) -> checksum of the part."""

_CHUNK_ELEMENTS = 1 << 20
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def partial_checksum(tensor: Tensor, index: tuple[slice, ...], full_shape: tuple[int, ...]) -> int:
    """Checksum (0 .. 2**64 - 1) of a shard, to be added to those of the other shards modulo 2**64.

    Args:
        tensor: the shard: any dtype of 1, 2 or 4 bytes, any strides, any device.
        index: which part of the full tensor it is; one slice of step 1 per dimension.
        full_shape: of the full tensor.

    Raises:
        ValueError: the shard does not have the shape that `index` selects.
    """
    bounds = [part.indices(size) for part, size in zip(index, full_shape, strict=True)]
    if [stop - start for start, stop, _ in bounds] != list(tensor.shape):
        raise ValueError(f"a shard of shape {tuple(tensor.shape)} does not fit the index {index} of {full_shape}")
    total = 0
    rows = torch.arange(bounds[0][0], bounds[0][1], device=tensor.device)
    inner = _flat_index(bounds[1:], full_shape[1:], tensor.device)
    rows_at_once = max(1, _CHUNK_ELEMENTS // max(1, inner.numel()))
    row_size = math.prod(full_shape[1:])
    for start in range(0, len(rows), rows_at_once):
        row = rows[start : start + rows_at_once]
        weights = _odd_weights(row[:, None] * row_size + inner[None, :])
        total += int((_bits(tensor[start : start + rows_at_once].reshape(len(row), -1)) * weights).sum())
    return total % 2**64


def combine(parts: Iterable[PartialChecksums]) -> dict[str, int]:
    """Checksums of whole tensors from those of the workers' parts.

    Copies of the same part (tensor-parallel replicas) count once.

    Raises:
        RuntimeError: two copies of a part differ.
    """
    unique: PartialChecksums = {}
    for part in parts:
        for key, value in part.items():
            if unique.setdefault(key, value) != value:
                raise RuntimeError(f"the workers of an engine hold different copies of {key[0]}")
    totals: dict[str, int] = {}
    for (name, _), value in unique.items():
        totals[name] = (totals.get(name, 0) + value) % 2**64
    return totals


def source_checksums(
    pieces: Iterator[tuple[str, tuple[slice, ...], Tensor]], shapes: dict[str, tuple[int, ...]]
) -> dict[str, int]:
    """The sums over a trainer rank's pieces (see `ShardedWeightSource`), to be added over ranks modulo 2**64."""
    totals: dict[str, int] = {}
    for name, index, shard in pieces:
        totals[name] = (totals.get(name, 0) + partial_checksum(shard, index, shapes[name])) % 2**64
    return totals


def differing(trainer: dict[str, int], engine: dict[str, int]) -> list[str]:
    """Names whose checksums differ, or that only one side has; empty when the engine holds the trainer's weights.

    With tied embeddings an engine also reports its output layer, which must equal the trainer's embedding.
    """
    expected = dict(trainer)
    if "lm_head.weight" in engine and "model.embed_tokens.weight" in trainer:
        expected.setdefault("lm_head.weight", trainer["model.embed_tokens.weight"])
    return sorted(name for name in expected.keys() | engine.keys() if expected.get(name) != engine.get(name))


def _flat_index(
    bounds: list[tuple[int, int, int]], shape: tuple[int, ...], device: torch.device
) -> Int[Tensor, "elements"]:
    flat = torch.zeros(1, dtype=torch.int64, device=device)
    for (start, stop, _), size in zip(bounds, shape, strict=True):
        flat = (flat[:, None] * size + torch.arange(start, stop, device=device)[None, :]).reshape(-1)
    return flat


def _odd_weights(index: Int[Tensor, "rows elements"]) -> Int[Tensor, "rows elements"]:
    """SplitMix64's finalizer (Steele, Lea, Flood 2014) of the index, made odd; int64 arithmetic wraps around."""
    z = index * -0x61C8864680B583EB  # the golden ratio constant 0x9E3779B97F4A7C15
    z = (z ^ ((z >> 30) & (2**34 - 1))) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
    z = (z ^ ((z >> 27) & (2**37 - 1))) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
    return (z ^ ((z >> 31) & (2**33 - 1))) | 1


def _bits(tensor: Tensor) -> Int[Tensor, "rows elements"]:
    if tensor.dtype.is_floating_point and tensor.element_size() > 1:
        tensor = tensor.masked_fill(tensor.abs() < torch.finfo(tensor.dtype).tiny, 0.0)
    return tensor.contiguous().view(_BITS[tensor.element_size()]).to(torch.int64)
