"""After an update of the policy, reused responses follow the new policy exactly with the coupled rule.

With SPEC-RL's rule (lenience 0) they do not, which shows that the test can fail: where a token is rejected, that rule
samples from the new policy, and not from the tokens that the old policy gave too little probability.
"""

import pytest
import torch
from torch import Tensor

from rollout.sampling.lenient import LenientDraft, verify_leniently
from rollout.sampling.verify import verify_tokens
from tests.rollout.sampling.test_distribution import LENGTH, SAMPLES, VOCAB, p_value, policy, sample


def updated(logits: Tensor) -> Tensor:
    """The policy after an update, large for one step."""
    generator = torch.Generator().manual_seed(11)
    return logits + 0.4 * torch.randn(logits.shape, generator=generator)


def log_probs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Of sequences under a chain policy, [SAMPLES, LENGTH]."""
    before = torch.cat([torch.full((len(tokens), 1), VOCAB), tokens[:, :-1]], dim=1)
    return logits.log_softmax(-1)[before].gather(2, tokens[..., None])[..., 0]


def reuse(old: Tensor, new: Tensor, earlier: Tensor, seeds: Tensor, lenience: float | None) -> Tensor:
    """LENGTH tokens of the new policy, with all of `earlier` as one draft; plain steps after a rejection.

    A draft that is longer than the response has no row for the token after it, as in an engine at its last token.
    """
    count = len(earlier)
    before = torch.cat([torch.full((count, 1), VOCAB), earlier], dim=1)
    rows = new[before.reshape(-1)]
    cu_rows = torch.arange(count + 1, dtype=torch.int32) * (LENGTH + 1)
    bound = None if lenience is None else torch.full((count,), lenience)
    thens = None if lenience is None else log_probs(old, earlier).reshape(-1).contiguous()
    temperature, positions = torch.ones(count), torch.full((count,), 7)
    drafts = earlier.reshape(-1).to(torch.int32)
    tokens, emitted, _ = verify_tokens(rows, cu_rows, drafts, temperature, seeds, positions, LENGTH + 1, thens, bound)
    out, done = tokens[:, :LENGTH].long(), emitted.long().clamp(max=LENGTH)
    alone, none = torch.arange(count + 1, dtype=torch.int32), torch.empty(0, dtype=torch.int32)
    while int(done.min()) < LENGTH:
        previous = out.gather(1, done[:, None] - 1)[:, 0]
        more, _, _ = verify_tokens(new[previous], alone, none, temperature, seeds, 7 + done, 1)
        open_ = done < LENGTH
        out[open_, done[open_]] = more[open_, 0].long()
        done = done + open_.long()
    return out


def test_coupled_reuse_follows_the_new_policy_and_the_vanilla_rule_does_not() -> None:
    old, new = policy(1.0, 1.0), updated(policy(1.0, 1.0))
    earlier = sample(old, 1.0, None)
    seeds = torch.arange(SAMPLES) * 977 + 13  # those that `sample` draws with
    coupled = reuse(old, new, earlier, seeds, None)
    vanilla = reuse(old, new, earlier, seeds + 5 * 10**9, 0.0)
    kept = float((coupled == earlier).all(1).double().mean())
    assert 0.1 < kept < 0.9, "the drafts must be worth something, and be rejected too"
    for length in (1, 3):
        assert p_value(coupled[:, :length], new, 1.0) > 1e-4
        assert p_value(vanilla[:, :length], new, 1.0) < 1e-6
        assert p_value(earlier[:, :length], new, 1.0) < 1e-6


@pytest.mark.parametrize("lenience", [-0.4, 0.0, 0.5])
def test_a_token_is_kept_with_the_chance_of_the_rule(lenience: float) -> None:
    """Also where it comes after all drafts, in a row of its own."""
    old, new = policy(1.0, 1.0), updated(policy(1.0, 1.0))
    earlier = sample(old, 1.0, None)
    thens = log_probs(old, earlier)
    gain = log_probs(new, earlier) - thens
    seeds = torch.arange(SAMPLES) * 31 + 10**12
    for drafts in (0, 1):
        before = torch.cat([torch.full((SAMPLES, 1), VOCAB), earlier], dim=1)[:, : drafts + 1]
        lenient = [
            LenientDraft(lenience, then[:drafts], token[drafts], then[drafts])
            for token, then in zip(earlier.tolist(), thens.tolist(), strict=True)
        ]
        (tokens, emitted, logprobs), marks = verify_leniently(
            lenient,
            new[before.reshape(-1)],
            torch.arange(SAMPLES + 1, dtype=torch.int32) * (drafts + 1),
            earlier[:, :drafts].reshape(-1).to(torch.int32),
            torch.ones(SAMPLES),
            seeds,
            torch.full((SAMPLES,), 7),
            drafts + 1,
            [drafts] * SAMPLES,
        )
        reached = emitted == drafts + 1
        chance = (lenience + gain).exp().clamp(max=1)
        share = chance[:, :drafts].prod(1)
        assert float(reached.double().mean()) == pytest.approx(float(share.mean()), abs=0.006)
        kept = marks[:, drafts] == 1
        assert float(kept.double().mean()) == pytest.approx(float((share * chance[:, drafts]).mean()), abs=0.006)
        assert not bool((kept & ~reached).any())
        assert torch.equal(tokens[kept].long(), earlier[kept, : drafts + 1])
        now = log_probs(new, earlier)
        torch.testing.assert_close(logprobs[kept], now[kept, : drafts + 1], atol=1e-5, rtol=0)
        # What replaces a rejected token is sampled from the new policy, which may draw the same token.
        fresh = tokens[reached & ~kept, drafts].long()
        expected = new.softmax(-1)[before[reached & ~kept, drafts]].mean(0)
        assert len(fresh) > 50
        shares, error = torch.bincount(fresh, minlength=VOCAB) / len(fresh), (0.25 / len(fresh)) ** 0.5
        torch.testing.assert_close(shares, expected, atol=4 * error, rtol=0)


def test_only_requests_with_a_lenience_go_by_the_lenient_rule() -> None:
    """One kept leniently beside one whose drafts are verified by the coupled rule."""
    new = policy(1.0, 1.0)
    rows = new[torch.tensor([VOCAB, 1, VOCAB, 1])]
    drafts = torch.tensor([1, 1], dtype=torch.int32)
    cu_rows = torch.tensor([0, 2, 4], dtype=torch.int32)
    arguments = rows, cu_rows, drafts, torch.ones(2), torch.tensor([5, 5]), torch.tensor([9, 9]), 2
    lenient = [LenientDraft(float("inf"), [-1.0], 0, -1.0), None]
    (tokens, emitted, _), marks = verify_leniently(lenient, *arguments, [1, 1])
    plain = verify_tokens(*arguments)
    assert tokens[0].tolist() == [1, 0] and marks.tolist() == [[0, 1], [0, 0]]
    assert torch.equal(tokens[1], plain.tokens[1]) and emitted[1] == plain.num_emitted[1]
