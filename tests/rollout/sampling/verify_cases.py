"""Calls of `verify_tokens` for its tests on CPU and GPU."""

from typing import Any

import torch
from torch import Tensor

from rollout.sampling.gumbel_noise import coupled_sample

Call = dict[str, Any]  # the arguments of verify_tokens by name

# Drafts of the requests in a mixed batch; request i has temperature TEMPERATURES[i], and so on.
MIXED_DRAFTS = [3, 0, 16, 1, 7, 0, 5, 2, 4, 1]
TEMPERATURES = [1.0, 1.3, 0.7, 0.0, 1.0, 0.0, 0.7, 1.3, 0.3, 1.0]
LENIENCE = [torch.nan, torch.nan, 0.5, 0.3, -0.5, 0.0, torch.inf, -torch.inf, 0.0, torch.nan]


def make_call(logits: Tensor, drafts: list[int], temperatures: list[float], seed: int = 0, right: float = 0.8) -> Call:
    """A call over `logits`, whose rows must be as many as the drafts ask for; most drafts are what will be sampled."""
    generator = torch.Generator().manual_seed(seed)
    batch, vocab = len(drafts), logits.shape[1]
    counts = torch.tensor([k + 1 for k in drafts], dtype=torch.int64)
    cu_rows = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    seeds = torch.randint(-(2**63), 2**63 - 1, (batch,), generator=generator)
    positions = torch.randint(0, 2**20, (batch,), generator=generator)
    temperature = torch.tensor(temperatures, dtype=torch.float32)
    request_of = torch.arange(batch).repeat_interleave(counts)
    offsets = torch.arange(len(logits)) - cu_rows[request_of]
    samples, _ = coupled_sample(logits, seeds[request_of], positions[request_of] + offsets, temperature[request_of])
    guesses = torch.randint(0, vocab, samples.shape, generator=generator)
    guesses = torch.where(torch.rand(samples.shape, generator=generator) < right, samples, guesses)
    has_draft = torch.ones(len(logits), dtype=torch.bool)
    has_draft[cu_rows[1:] - 1] = False
    return {
        "logits": logits,
        "cu_rows": cu_rows.int(),
        "draft_ids": guesses[has_draft].int(),
        "temperature": temperature,
        "seeds": seeds,
        "positions": positions,
        "max_rows": max(drafts, default=0) + 1,
    }


def mixed_call(vocab: int, dtype: torch.dtype, lenient: bool = False, seed: int = 0) -> Call:
    """Greedy and sampling requests with few and many drafts; some tokens are masked out."""
    generator = torch.Generator().manual_seed(seed + 1)
    rows = sum(MIXED_DRAFTS) + len(MIXED_DRAFTS)
    logits = torch.randn(rows, vocab, generator=generator) * 3
    masked = torch.rand(rows, vocab, generator=generator) < torch.rand(rows, 1, generator=generator) * 0.9
    masked[:, generator.initial_seed() % vocab] = False
    call = make_call(logits.masked_fill(masked, -torch.inf).to(dtype), MIXED_DRAFTS, TEMPERATURES, seed)
    if lenient:
        then = -torch.rand(len(call["draft_ids"]), generator=generator) * 6
        call |= {"draft_logprobs": then, "lenience": torch.tensor(LENIENCE)}
    return call


def single_rows(logits: Tensor, temperature: float = 1.0, seed: int = 0) -> Call:
    """Each row a request of its own, without drafts."""
    return make_call(logits, [0] * len(logits), [temperature] * len(logits), seed)


def shapes_of_logits(vocab: int) -> dict[str, Tensor]:
    """Rows that are hard on the pruning of tokens: huge, flat, peaked, and with the winner in odd positions."""
    ramp = torch.linspace(-40, 40, vocab)
    peaks = torch.zeros(vocab)
    peaks[[0, vocab // 2, vocab - 1]] = torch.tensor([12.0, 12.1, 11.9])
    lonely = torch.full((vocab,), -torch.inf)
    lonely[vocab - 1] = -7.0
    few = torch.full((vocab,), -torch.inf)
    few[torch.arange(0, vocab, max(vocab // 5, 1))] = 1.0
    return {
        "flat": torch.zeros(vocab),
        "flat and huge": torch.full((vocab,), 1e30),
        "flat and very negative": torch.full((vocab,), -1e30),
        "huge and different": torch.randn(vocab, generator=torch.Generator().manual_seed(3)) * 1e30,
        "largest float32": torch.full((vocab,), torch.finfo(torch.float32).max),
        "around 1e13": torch.full((vocab,), 1e13),
        "thousands": torch.randn(vocab, generator=torch.Generator().manual_seed(4)) * 1000,
        "rising": ramp,
        "falling": ramp.flip(0),
        "three peaks": peaks,
        "winner in the last lane": torch.zeros(vocab).index_fill(0, torch.tensor([vocab - 1]), 50.0),
        "one token left": lonely,
        "few tokens left": few,
        "denormal": torch.full((vocab,), 1e-40),
        "almost flat": torch.randn(vocab, generator=torch.Generator().manual_seed(5)) * 1e-3,
    }
