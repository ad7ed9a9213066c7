"""Coupled sampling: the sampled token is a function of logits, seed and position alone (DESIGN section 2).

`argmax_v(logits[v] / T + g(seed, position, v))` with Gumbel noise g is an exact sample of `softmax(logits / T)` (the
Gumbel-max trick). The noise is counter-based: a 32-bit murmur3 hash of (seed, position, token id), the stream of vLLM's
V2 sampler, so nothing but the seed has to be remembered to draw it again. This is the readable PyTorch form.
"""

from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

# A row of a large vocabulary is processed alone, many rows of a small one together: temporaries stay near 4 MiB each.
CHUNK_ELEMENTS = 1 << 20

# The constants of MurmurHash3_x86_32 (public domain, A. Appleby), as signed 32-bit numbers.
_C1 = 0xCC9E2D51 - (1 << 32)
_C2 = 0x1B873593
_ADD = 0xE6546B64 - (1 << 32)
_FINAL_1 = 0x85EBCA6B - (1 << 32)
_FINAL_2 = 0xC2B2AE35 - (1 << 32)
_HASHED_BYTES = 16  # seed (8), position (4), token id (4)


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
def _scrambled_token_ids(vocab_size: int, device: torch.device) -> Int[Tensor, " vocab"]:
    return _scramble(torch.arange(vocab_size, dtype=torch.int32, device=device))


def noise_bits(
    seeds: Int[Tensor, " rows"], positions: Int[Tensor, " rows"], vocab_size: int
) -> Int[Tensor, "rows vocab"]:
    """murmur3 hash of (seed, position, token id) for all token ids below `vocab_size`.

    `seeds` and `positions` are int64 (of positions only the low 32 bits count). Returns int32 holding the 32 hash bits.
    """
    state = torch.zeros_like(seeds, dtype=torch.int32)
    for block in (_low_32_bits(seeds), _low_32_bits(seeds >> 32), _low_32_bits(positions)):
        state = _absorb(state, _scramble(block))
    h = _absorb(state[:, None], _scrambled_token_ids(vocab_size, seeds.device)[None, :])
    h.bitwise_xor_(_HASHED_BYTES)
    _xor_shift_(h, 16).mul_(_FINAL_1)
    _xor_shift_(h, 13).mul_(_FINAL_2)
    return _xor_shift_(h, 16)


def gumbel_noise(
    seeds: Int[Tensor, " rows"], positions: Int[Tensor, " rows"], vocab_size: int
) -> Float[Tensor, "rows vocab"]:
    """float32 Gumbel(0, 1) noise `-log(-log(1 - u))`, `u = (hash + 0.5) / 2**32`.

    The large values, which decide the argmax, come from u near 0, where float32 is finest.
    """
    bits = noise_bits(seeds, positions, vocab_size)
    # Both 16-bit halves convert to float32 exactly, so their sum is the correctly rounded u.
    u = ((bits >> 16) & 0xFFFF).to(torch.float32).mul_(2.0**-16)
    u.add_((bits & 0xFFFF).to(torch.float32).add_(0.5).mul_(2.0**-32))
    u.clamp_(max=1.0 - 2.0**-24)  # u may round to 1, whose noise would be -inf
    return u.neg_().log1p_().neg_().log_().neg_()


def coupled_sample(
    logits: Float[Tensor, "rows vocab"],
    seeds: Int[Tensor, " rows"],
    positions: Int[Tensor, " rows"],
    temperature: Float[Tensor, " rows"],
    chunk_elements: int = CHUNK_ELEMENTS,
) -> tuple[Int[Tensor, " rows"], Float[Tensor, " rows"]]:
    """Sample one token per row, with the noise of its seed and position.

    `logits` may be of any float dtype, with excluded tokens at -inf; `seeds` and `positions` are int64; `positions` are
    those of the rows' input tokens; a `temperature` (float32) of 0 means greedy. Returns token ids (int64) and
    their log-probabilities (float32) under `softmax(logits / T)`, or `softmax(logits)` where greedy.
    """
    rows, vocab_size = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    logprobs = torch.empty(rows, dtype=torch.float32, device=logits.device)
    rows_at_once = max(1, chunk_elements // vocab_size)
    for start in range(0, rows, rows_at_once):
        chunk = slice(start, start + rows_at_once)
        greedy = (temperature[chunk] == 0)[:, None]
        scaled = logits[chunk].float() / torch.where(greedy, 1.0, temperature[chunk, None])
        noise = gumbel_noise(seeds[chunk], positions[chunk], vocab_size)
        chosen = (scaled + noise.masked_fill_(greedy, 0.0)).argmax(dim=-1)
        tokens[chunk] = chosen
        logprobs[chunk] = scaled.gather(1, chosen[:, None])[:, 0] - scaled.logsumexp(dim=-1)
    return tokens, logprobs
