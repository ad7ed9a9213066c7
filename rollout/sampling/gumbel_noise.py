"""Coupled sampling: the sampled token is a function of logits, seed and position alone (see docs/architecture.md).

`argmax_v(logits[v] / T + g(seed, position, v))` with Gumbel noise g is an exact sample of `softmax(logits / T)` (the
Gumbel-max trick). The noise is counter-based: a 32-bit murmur3 hash of (seed, position, token id), the stream of vLLM's
V2 sampler, so the seed is all that is needed to draw it again. This is the readable PyTorch form; csrc/noise.h is the
native operator's. Both add the noise in float64, where two scores are hardly ever too close to be told apart.
"""

from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

# A row of a large vocabulary is processed alone, many rows of a small one together: temporaries stay near 4 MiB each.
CHUNK_ELEMENTS = 1 << 19
GREEDY_BELOW = 1e-5
"""vLLM's limit: temperatures below it mean greedy."""

# The constants of MurmurHash3_x86_32 (public domain, A. Appleby), as signed 32-bit numbers.
_C1 = 0xCC9E2D51 - (1 << 32)
_C2 = 0x1B873593
_ADD = 0xE6546B64 - (1 << 32)
_FINAL_1 = 0x85EBCA6B - (1 << 32)
_FINAL_2 = 0xC2B2AE35 - (1 << 32)
_HASHED_BYTES = 16  # seed (8), position (4), token id (4)
# Hashed instead of a token id for the lenient rule's uniform: no vocabulary has it, so the streams are independent.
_ACCEPTANCE_BLOCK = -1


def _rotate_left(x: Tensor, bits: int) -> Tensor:
    # `>>` on signed integers repeats the sign; the mask removes those copies.
    return (x << bits) | ((x >> (32 - bits)) & ((1 << bits) - 1))


def _scramble(block: Tensor) -> Tensor:
    return _rotate_left(block * _C1, 15) * _C2


def _absorb(state: Tensor, scrambled: Tensor) -> Tensor:
    return _rotate_left(state ^ scrambled, 13) * 5 + _ADD


def _xor_shift_(x: Tensor, bits: int) -> Tensor:
    return x.bitwise_xor_((x >> bits) & ((1 << (32 - bits)) - 1))


def _low_32_bits(x: Tensor) -> Tensor:
    """The low half of int64 numbers, as int32 with the same bits."""
    return (((x & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000).to(torch.int32)


@lru_cache(maxsize=4)
def _scrambled_token_ids(vocab_size: int, device: torch.device) -> Int[Tensor, "vocab"]:
    return _scramble(torch.arange(vocab_size, dtype=torch.int32, device=device))


def _row_states(seeds: Int[Tensor, "rows"], positions: Int[Tensor, "rows"]) -> Int[Tensor, "rows"]:
    """The hash's state after the seed and the position."""
    state = torch.zeros_like(seeds, dtype=torch.int32)
    for block in (_low_32_bits(seeds), _low_32_bits(seeds >> 32), _low_32_bits(positions)):
        state = _absorb(state, _scramble(block))
    return state


def _finish(state: Tensor, scrambled_ids: Tensor) -> Tensor:
    h = _absorb(state, scrambled_ids)
    h.bitwise_xor_(_HASHED_BYTES)
    _xor_shift_(h, 16).mul_(_FINAL_1)
    _xor_shift_(h, 13).mul_(_FINAL_2)
    return _xor_shift_(h, 16)


def _uniform(bits: Tensor) -> Tensor:
    """u = (hash + 0.5) / 2**32 in float64, exactly; never 0 or 1."""
    return (bits.long() & 0xFFFFFFFF).double().add_(0.5).mul_(2.0**-32)


def noise_bits(
    seeds: Int[Tensor, "rows"], positions: Int[Tensor, "rows"], vocab_size: int
) -> Int[Tensor, "rows vocab"]:
    """murmur3 hash of (seed, position, token id) for all token ids below `vocab_size`.

    Args:
        seeds: int64.
        positions: int64; the low 32 bits count.
        vocab_size: number of token ids.

    Returns:
        int32, holding the 32 bits of the hash.
    """
    return _finish(_row_states(seeds, positions)[:, None], _scrambled_token_ids(vocab_size, seeds.device)[None, :])


def gumbel_noise(
    seeds: Int[Tensor, "rows"], positions: Int[Tensor, "rows"], vocab_size: int
) -> Float[Tensor, "rows vocab"]:
    """float64 Gumbel(0, 1) noise `-log(-log(1 - u))`, `u = (hash + 0.5) / 2**32`.

    `1 - u` is exact in float64, and the large values, which decide the argmax, come from u near 0.
    """
    u = _uniform(noise_bits(seeds, positions, vocab_size))
    return u.neg_().add_(1.0).log_().neg_().log_().neg_()


def acceptance_uniforms(seeds: Int[Tensor, "rows"], positions: Int[Tensor, "rows"]) -> Float[Tensor, "rows"]:
    """float64 uniforms in (0, 1) for the lenient rule, independent of the Gumbel noise of that seed and position."""
    block = torch.full_like(seeds, _ACCEPTANCE_BLOCK, dtype=torch.int32)
    return _uniform(_finish(_row_states(seeds, positions), _scramble(block)))


def scale(logits: Float[Tensor, "rows vocab"], temperature: Float[Tensor, "rows"]) -> Float[Tensor, "rows vocab"]:
    """float32 logits times 1/T, or as they are where greedy."""
    return logits.float() * torch.where(temperature < GREEDY_BELOW, 1.0, temperature.reciprocal())[:, None]


def coupled_sample(
    logits: Float[Tensor, "rows vocab"],
    seeds: Int[Tensor, "rows"],
    positions: Int[Tensor, "rows"],
    temperature: Float[Tensor, "rows"],
    chunk_elements: int = CHUNK_ELEMENTS,
) -> tuple[Int[Tensor, "rows"], Float[Tensor, "rows"]]:
    """Sample one token per row, with the noise of its seed and position.

    Args:
        logits: any float dtype; excluded tokens at -inf.
        seeds: int64.
        positions: int64, of the rows' input tokens.
        temperature: float32; below 1e-5 means greedy.
        chunk_elements: logits that are processed at a time.

    Returns:
        Token ids (int64, the lowest on ties) and their log-probabilities (float32) under `softmax(logits / T)`, or
        `softmax(logits)` if greedy.
    """
    rows, vocab_size = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    logprobs = torch.empty(rows, dtype=torch.float32, device=logits.device)
    rows_at_once = max(1, chunk_elements // vocab_size)
    for start in range(0, rows, rows_at_once):
        chunk = slice(start, start + rows_at_once)
        scaled = scale(logits[chunk], temperature[chunk]).double()
        scores = gumbel_noise(seeds[chunk], positions[chunk], vocab_size)
        scores.masked_fill_((temperature[chunk] < GREEDY_BELOW)[:, None], 0.0).add_(scaled)
        tokens[chunk] = scores.argmax(dim=-1)
        logprobs[chunk] = scaled.gather(1, tokens[chunk, None])[:, 0] - scaled.logsumexp(dim=-1)
    return tokens, logprobs
