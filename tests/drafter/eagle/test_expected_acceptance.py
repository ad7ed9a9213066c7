"""The expected acceptance is what coupled verification with shared noise really accepts."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from drafter.eagle.draft_loss import LossOptions
from drafter.eagle.expected_acceptance import ExpectedAcceptance, agreement, expected_acceptance
from drafter.eagle.head import EagleHead, HeadConfig
from drafter.eagle.packed_rows import FrozenPolicy, PackedFeatures
from drafter.eagle.vocabulary import DraftVocabulary
from tests.drafter.policies import model_features, model_weights, pack, random_policy, random_row, sample, small_config
from tests.drafter.policies import train as train_head
from tests.rollout.tiny_models import make_model


def shared_noise_counts(policy: Tensor, draft: Tensor, token_ids: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """How often the policy samples each token, and how often the drafter then samples it too."""
    noise = -torch.empty(samples, len(policy)).exponential_(generator=torch.Generator().manual_seed(0)).log()
    sampled = (policy + noise).argmax(dim=-1)
    drafted = token_ids[(draft + noise[:, token_ids]).argmax(dim=-1)]
    counts = torch.bincount(sampled, minlength=len(policy))
    return counts, torch.bincount(sampled[sampled == drafted], minlength=len(policy))


@pytest.mark.parametrize("reduced", [False, True])
def test_agreement_is_the_share_that_shared_noise_gives(reduced: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    vocab, samples = 9, 200_000
    token_ids = torch.tensor([0, 2, 3, 5, 8]) if reduced else torch.arange(vocab)
    policy = torch.randn(vocab, generator=generator).log_softmax(dim=-1)
    draft = (policy[token_ids] + torch.randn(len(token_ids), generator=generator)).log_softmax(dim=-1)
    counts, agreed = shared_noise_counts(policy, draft, token_ids, samples)
    chances = agreement(policy.expand(vocab, -1), draft.expand(1, vocab, -1), token_ids, torch.arange(vocab))[0]
    error = (chances * (1 - chances) / counts).sqrt()
    assert ((agreed / counts - chances).abs() <= 4 * error).all()
    assert (chances > 0).tolist() == torch.isin(torch.arange(vocab), token_ids).tolist()
    # The published bounds of the whole chance, in terms of the total variation distance.
    full = torch.zeros(vocab).index_put((token_ids,), draft.exp())
    distance = float((policy.exp() - full).abs().sum() / 2)
    whole = float((policy.exp() * chances).sum())
    assert (1 - distance) / (1 + distance) <= whole <= 1 - distance


def test_a_drafter_equal_to_the_policy_is_always_accepted() -> None:
    policy = (3 * torch.randn(50, 30)).log_softmax(dim=-1)
    chances = agreement(policy, policy[None], torch.arange(30), torch.randint(30, (50,)))
    torch.testing.assert_close(chances, torch.ones(1, 50))


def simulate(
    head: EagleHead, row: PackedFeatures, policy: FrozenPolicy, steps: int, temperature: float
) -> ExpectedAcceptance:
    """Drafts of one sequence under shared noise that is redrawn, given that the policy samples the row's tokens."""
    generator = torch.Generator().manual_seed(0)
    trials, length = 2000, len(row.token_ids)
    reached, accepted = torch.zeros(2, steps, dtype=torch.float64)
    policy_logprobs = (row.final_hidden @ policy.lm_head.T / temperature).log_softmax(dim=-1)
    for anchor in range(length - 2):
        if not row.response_mask[anchor + 1]:
            continue
        drafts, alive = head.start(row.hidden_states, row.cu_seqlens), torch.ones(trials, dtype=torch.bool)
        for step in range(min(steps, length - 2 - anchor)):
            states = drafts.step(policy.embedding[row.token_ids.roll(-1 - step)])
            draft = (head.logits(states[anchor], policy.lm_head) / temperature).log_softmax(dim=-1)
            token, target = row.token_ids[anchor + 2 + step], policy_logprobs[anchor + 1 + step].exp()
            # A race of exponential clocks that `token` wins: the first ring is exponential, the others come after it.
            first, later = torch.empty(2, trials, len(target)).exponential_(generator=generator)
            rings = first[:, :1] + later / target
            rings[:, token] = first[:, 0]
            noise = -(rings * target).log()
            reached[step] += alive.double().mean()
            alive &= head.token_ids[(draft + noise[:, head.token_ids]).argmax(dim=-1)] == token
            accepted[step] += alive.double().mean()
    return ExpectedAcceptance(reached, accepted)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_it_is_what_simulated_verification_accepts(temperature: float) -> None:
    torch.manual_seed(0)
    config = small_config("eagle3", draft_vocab_size=22)
    head = EagleHead(config, DraftVocabulary(torch.arange(22) + 1, 24))
    row, policy = random_row(config, [20], prompt=3), random_policy(config)
    row = replace(row, final_hidden=row.final_hidden * 0.05)  # flat distributions: sharp random ones never agree
    with torch.no_grad():
        expected = expected_acceptance(head, row, policy, 3, temperature)
        simulated = simulate(head, row, policy, 3, temperature)
    torch.testing.assert_close(expected.reached, simulated.reached, rtol=0.02, atol=0)
    torch.testing.assert_close(expected.accepted, simulated.accepted, rtol=0.02, atol=0)
    torch.testing.assert_close(expected.per_position, simulated.per_position, rtol=0.02, atol=0)
    assert expected.expected_length == pytest.approx(1 + float(expected.per_position.cumprod(0).sum()))
    assert expected.expected_length > 1.5


def test_rows_add_up_and_their_parts_do_not_matter() -> None:
    torch.manual_seed(0)
    head = EagleHead(small_config("eagle3"))
    policy = random_policy(head.config)
    rows = [random_row(head.config, [length], seed=length) for length in (9, 14, 3)]
    apart = [expected_acceptance(head, row, policy, 4) for row in rows]
    together = expected_acceptance(head, pack(rows, padding=2), policy, 4, rows_at_once=5)
    total = apart[0] + apart[1] + apart[2]
    torch.testing.assert_close(together.accepted, total.accepted)
    torch.testing.assert_close(together.reached, total.reached)
    assert total.reached[0] == 6 + 11 + 0


def test_no_anchor_means_no_acceptance_and_no_nan() -> None:
    head = EagleHead(small_config("eagle3"))
    nothing = expected_acceptance(head, random_row(head.config, [4], prompt=4), random_policy(head.config), 3)
    assert nothing.per_position.tolist() == [0, 0, 0]
    assert nothing.expected_length == 1


def test_a_temperature_of_zero_is_refused() -> None:
    head = EagleHead(small_config("eagle3"))
    with pytest.raises(ValueError, match="temperature=0"):
        expected_acceptance(head, random_row(head.config, [4]), random_policy(head.config), 3, temperature=0)


@pytest.mark.parametrize("kind", ["eagle3", "eagle"])
def test_training_lifts_the_acceptance_on_held_out_rollouts(tmp_path: Path, kind: str) -> None:
    path = make_model(tmp_path / "model", num_hidden_layers=4, vocab_size=24, tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    # Of the random function that a policy is, the part that a small head can learn: mostly the last token decides.
    model.get_input_embeddings().weight.data.mul_(10)
    model.get_output_embeddings().weight.data.mul_(3)
    policy = model_weights(model)
    config = HeadConfig.for_policy(json.loads((path / "config.json").read_text()), kind)
    prompts = [[4 + (7 * prompt + position) % 20 for position in range(6)] for prompt in range(40)]
    rollouts = [model_features(model, tokens, 6, config) for tokens in sample(model, prompts, 42)]
    rows = [pack(rollouts[start : start + 4]) for start in range(0, 32, 4)]
    held_out = pack(rollouts[32:])
    torch.manual_seed(0)
    head = EagleHead(config)
    before = expected_acceptance(head, held_out, policy, 4)
    options = LossOptions(steps=4, hidden=1.0 if kind == "eagle" else 0.0)
    train_head(head, lambda step: rows[step % 8], policy, 100, options)
    after = expected_acceptance(head, held_out, policy, 4)
    assert before.expected_length < 1.2
    assert after.expected_length > before.expected_length + 0.4
