"""Coupled sampling as a function: the hash, the distribution, and what the tokens depend on."""

import math

import pytest
import torch

from rollout.sampling.gumbel_noise import coupled_sample, gumbel_noise, noise_bits

MASK = 0xFFFFFFFF


def murmur3(seed: int, position: int, token: int) -> int:
    """MurmurHash3_x86_32 of the 16 bytes (seed, position, token), straight from its definition."""
    data = (seed % 2**64).to_bytes(8, "little") + (position % 2**32).to_bytes(4, "little") + token.to_bytes(4, "little")
    h = 0
    for start in range(0, 16, 4):
        k = int.from_bytes(data[start : start + 4], "little") * 0xCC9E2D51 & MASK
        k = (k << 15 | k >> 17) & MASK
        h ^= k * 0x1B873593 & MASK
        h = (h << 13 | h >> 19) & MASK
        h = (h * 5 + 0xE6546B64) & MASK
    h ^= len(data)
    h = (h ^ h >> 16) * 0x85EBCA6B & MASK
    h = (h ^ h >> 13) * 0xC2B2AE35 & MASK
    return h ^ h >> 16


def test_the_hash_is_bit_equal_to_murmur3() -> None:
    seeds = [0, 1, 2**31, 2**32 - 1, 2**32, 2**62 + 12345, 2**63 - 1]
    positions = [0, 1, 7, 4095, 2**20, 2**31 - 1, 5]
    bits = noise_bits(torch.tensor(seeds), torch.tensor(positions), 300)
    for row, (seed, position) in enumerate(zip(seeds, positions, strict=True)):
        expected = [murmur3(seed, position, token) for token in range(300)]
        assert [b % 2**32 for b in bits[row].tolist()] == expected


def test_the_noise_is_the_gumbel_transform_of_the_hash() -> None:
    seeds, positions = torch.tensor([3, 4]), torch.tensor([10, 2**20])
    noise = gumbel_noise(seeds, positions, 500)
    for row in range(2):
        for token in range(500):
            u = (murmur3(int(seeds[row]), int(positions[row]), token) + 0.5) / 2**32
            assert noise[row, token].item() == pytest.approx(-math.log(-math.log1p(-u)), abs=2e-4, rel=1e-5)


def test_the_noise_is_finite_and_has_the_gumbel_mean_and_variance() -> None:
    noise = gumbel_noise(torch.arange(64), torch.full((64,), 9), 20_000).double()
    assert noise.isfinite().all()
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.005)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.01)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_tokens_are_distributed_as_the_softmax(temperature: float) -> None:
    draws, vocab = 200_000, 12
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(1)) * 1.5
    tokens, _ = coupled_sample(
        logits.expand(draws, vocab),
        torch.arange(draws) * 7919,
        torch.arange(draws) % 50,
        torch.full((draws,), temperature),
    )
    expected = (logits / temperature).softmax(0) * draws
    chi_square = ((tokens.bincount(minlength=vocab) - expected) ** 2 / expected).sum().item()
    assert chi_square < 31.3  # 11 degrees of freedom, p = 0.001


def test_positions_of_one_seed_draw_independently() -> None:
    draws = 100_000
    logits = torch.zeros(draws, 4)
    seeds, ones = torch.arange(draws), torch.ones(draws)
    first, _ = coupled_sample(logits, seeds, torch.full((draws,), 5), ones)
    second, _ = coupled_sample(logits, seeds, torch.full((draws,), 6), ones)
    counts = (first * 4 + second).bincount(minlength=16)
    assert ((counts - draws / 16) ** 2 / (draws / 16)).sum().item() < 37.7  # 15 degrees of freedom, p = 0.001


def test_logprobs_are_those_of_the_scaled_softmax_and_greedy_is_argmax() -> None:
    logits = torch.randn(5, 40)
    temperature = torch.tensor([0.0, 0.0, 0.7, 1.0, 2.0])
    tokens, logprobs = coupled_sample(logits, torch.arange(5), torch.arange(5), temperature)
    assert torch.equal(tokens[:2], logits[:2].argmax(-1))
    scale = torch.tensor([1.0, 1.0, 0.7, 1.0, 2.0])[:, None]
    expected = (logits / scale).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(logprobs, expected)


def test_excluded_tokens_are_never_sampled() -> None:
    logits = torch.zeros(2000, 10)
    logits[:, 3:] = -torch.inf
    tokens, logprobs = coupled_sample(
        logits, torch.arange(2000), torch.zeros(2000, dtype=torch.int64), torch.ones(2000)
    )
    assert set(tokens.tolist()) == {0, 1, 2}
    torch.testing.assert_close(logprobs, torch.full((2000,), -math.log(3)))


@pytest.mark.parametrize("chunk_elements", [1, 100, 1000, 10**6])
def test_the_size_of_the_chunks_changes_nothing(chunk_elements: int) -> None:
    logits = torch.randn(17, 333).bfloat16()
    arguments = logits, torch.arange(17) + 2**40, torch.arange(17), torch.rand(17) + 0.5
    tokens, logprobs = coupled_sample(*arguments, chunk_elements=chunk_elements)
    all_tokens, all_logprobs = coupled_sample(*arguments)
    assert torch.equal(tokens, all_tokens)
    torch.testing.assert_close(logprobs, all_logprobs)
