"""Verified tokens follow the policy's exact distribution, whatever the drafts: chi-square over one, two, three tokens.

The policy is a random chain over a few tokens, so that the probability of every sequence is known. The drafts are good,
bad, or the worst there are (always the least likely token).
"""

import pytest
import torch
from torch import Tensor

from rollout.sampling.verify import verify_tokens

VOCAB, SAMPLES, LENGTH = 6, 120_000, 3


def policy(temperature: float, top_p: float) -> Tensor:
    """Logits of the next token after each token, [VOCAB + 1, VOCAB]; the last row is for the beginning."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(VOCAB + 1, VOCAB, generator=generator) * 1.5
    if top_p < 1:
        ordered, order = (logits / temperature).softmax(-1).sort(-1, descending=True)
        outside = ordered.cumsum(-1) - ordered >= top_p
        logits = logits.masked_fill(torch.zeros_like(outside).scatter(1, order, outside), -torch.inf)
    return logits


def drafts_of(kind: str, probabilities: Tensor, seeds: Tensor) -> Tensor:
    """Two draft tokens for each sample, int32 [SAMPLES, 2]."""
    generator = torch.Generator().manual_seed(5)
    if kind == "worst":
        return torch.full((len(seeds), 2), int(probabilities[-1].argmin()), dtype=torch.int32)
    if kind == "likely":
        first = int(probabilities[-1].argmax())
        return torch.tensor([[first, int(probabilities[first].argmax())]], dtype=torch.int32).expand(len(seeds), 2)
    return torch.randint(VOCAB, (len(seeds), 2), generator=generator, dtype=torch.int32)


def sample(logits: Tensor, temperature: float, drafts: Tensor | None, position_defect: int = 0) -> Tensor:
    """LENGTH tokens for each seed, [SAMPLES, LENGTH], by verification of the drafts and plain steps after."""
    seeds = torch.arange(SAMPLES) * 977 + 13
    temperatures = torch.full((SAMPLES,), temperature)
    out = torch.full((SAMPLES, LENGTH), -1)
    done = torch.zeros(SAMPLES, dtype=torch.long)
    previous = torch.full((SAMPLES,), VOCAB)
    if drafts is not None:
        contexts = torch.cat([previous[:, None], drafts.long()], dim=1)
        rows = logits[contexts.reshape(-1)]
        cu_rows = torch.arange(SAMPLES + 1, dtype=torch.int32) * 3
        positions = torch.full((SAMPLES,), 7 + position_defect)
        tokens, emitted, _ = verify_tokens(
            rows, cu_rows, drafts.reshape(-1).contiguous(), temperatures, seeds, positions, 3
        )
        out[:, :] = tokens
        done = emitted.long()
        previous = out.gather(1, done[:, None] - 1)[:, 0]
    cu_rows = torch.arange(SAMPLES + 1, dtype=torch.int32)
    none = torch.empty(0, dtype=torch.int32)
    while int(done.min()) < LENGTH:
        tokens, _, _ = verify_tokens(logits[previous], cu_rows, none, temperatures, seeds, 7 + done, 1)
        open_ = done < LENGTH
        position = done.clamp(max=LENGTH - 1)
        out[open_, position[open_]] = tokens[open_, 0].long()
        previous = torch.where(open_, tokens[:, 0].long(), previous)
        done = done + open_.long()
    return out


def p_value(tokens: Tensor, logits: Tensor, temperature: float) -> float:
    """Chi-square test of sequences of `tokens.shape[1]` tokens against their exact probabilities."""
    probabilities = (logits / temperature).softmax(-1).double()
    length = tokens.shape[1]
    joint = probabilities[-1]
    for _ in range(length - 1):
        joint = joint[..., None] * probabilities[:VOCAB].reshape((1,) * (joint.dim() - 1) + (VOCAB, VOCAB))
    code = sum(tokens[:, position] * VOCAB ** (length - 1 - position) for position in range(length))
    counts = torch.bincount(code, minlength=VOCAB**length).double()  # type: ignore[arg-type]
    expected = joint.reshape(-1) * len(tokens)
    if (counts[expected == 0] > 0).any():
        return 0.0
    often = expected >= 8
    rest, rest_expected = counts[~often].sum(), expected[~often].sum()
    chi_square = ((counts - expected)[often] ** 2 / expected[often]).sum()
    freedom = int(often.sum()) - 1
    if rest_expected > 1:
        chi_square, freedom = chi_square + (rest - rest_expected) ** 2 / rest_expected, freedom + 1
    return float(torch.special.gammaincc(torch.tensor(freedom / 2.0), chi_square.float() / 2))


@pytest.mark.parametrize("drafts", ["none", "likely", "random", "worst"])
@pytest.mark.parametrize(("temperature", "top_p"), [(0.7, 1.0), (1.0, 1.0), (1.3, 1.0), (1.0, 0.8)])
def test_sequences_follow_the_policy(temperature: float, top_p: float, drafts: str) -> None:
    logits = policy(temperature, top_p)
    probabilities = (logits / temperature).softmax(-1)
    chosen = None if drafts == "none" else drafts_of(drafts, probabilities, torch.arange(SAMPLES))
    tokens = sample(logits, temperature, chosen)
    for length in (1, 2, 3):
        assert p_value(tokens[:, :length], logits, temperature) > 1e-4


def test_the_tokens_are_those_of_plain_decoding() -> None:
    logits = policy(1.0, 1.0)
    plain = sample(logits, 1.0, None)
    for kind in ("likely", "random", "worst"):
        assert torch.equal(sample(logits, 1.0, drafts_of(kind, logits.softmax(-1), torch.arange(SAMPLES))), plain)


def test_the_test_sees_a_wrong_rule() -> None:
    """Accepting a draft that the sample differs from in one case of ten is found by each length; so is reused noise."""
    logits = policy(1.0, 1.0)
    drafts = drafts_of("likely", logits.softmax(-1), torch.arange(SAMPLES)).clone()
    tokens = sample(logits, 1.0, drafts)
    wrong = tokens.clone()
    lucky = torch.arange(SAMPLES) % 10 == 0
    wrong[lucky, 0] = drafts[lucky, 0].long()
    for length in (1, 2, 3):
        assert p_value(wrong[:, :length], logits, 1.0) < 1e-6
    # The draft's noise at one position, plain decoding's at the one before: tokens two and three share their noise.
    stale = sample(logits, 1.0, drafts, position_defect=1)
    assert not torch.equal(stale, tokens)
    assert p_value(stale, logits, 1.0) < 1e-6
