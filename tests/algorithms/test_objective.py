import math
from dataclasses import replace

import pytest
import torch

from megatron_rl.algorithms import PolicyTokens, correct_mismatch, load_algorithm, policy_objective, token_weights
from megatron_rl.config.algorithm import AlgorithmConfig, CorrectionConfig, KlConfig

FULL = load_algorithm(
    AlgorithmConfig(clip_low=0.2, clip_high=0.3, dual_clip=3.0, entropy_coef=0.1, kl=KlConfig(coef=0.5, estimator="k2"))
)
CORRECTIONS = [
    CorrectionConfig(),
    CorrectionConfig(level="sequence", normalize=True),
    CorrectionConfig(kind="mask", cap=1.15, floor=0.5, normalize=True),
    CorrectionConfig(kind="mask", level="sequence", cap=1.5, veto=0.5),
    CorrectionConfig(kind="mask", level="geometric", cap=1.2),
]
AGGREGATIONS = ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"]


def _log(*values):
    return torch.tensor(values, dtype=torch.float64).log()


def test_all_terms_by_hand():
    old = _log(0.5, 0.5)
    new = (old + _log(1.5, 1.0)).requires_grad_()
    tokens = PolicyTokens(
        new_logprobs=new,
        entropy=torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True),
        old_logprobs=old,
        importance=torch.tensor([2.0, 0.5], dtype=torch.float64),
        ref_logprobs=new.detach() - torch.tensor([1.0, 2.0], dtype=torch.float64),
        advantages=torch.tensor([2.0, -1.0], dtype=torch.float64),
        weights=torch.tensor([0.25, 0.75], dtype=torch.float64),
        lengths=torch.tensor([2]),
        total_tokens=4,
    )
    loss, metrics = policy_objective(tokens, FULL)
    # Token 1: r = 1.5 clipped at 1.3, -2.6; importance weight 2; KL 1/2; entropy 1.
    # Token 2: r = 1, 1.0; importance weight 1/2; KL 2; entropy 2.
    policy = 0.25 * (-2.6 * 2) + 0.75 * (1.0 * 0.5)
    assert loss.item() == pytest.approx(policy + 0.5 * (0.25 * 0.5 + 0.75 * 2) - 0.1 * (0.25 * 1 + 0.75 * 2))
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(
        {
            "loss": loss.item(),
            "policy_loss": policy,
            "clip_fraction": 1 / 4,
            "entropy": 3 / 4,
            "kl": 2.5 / 4,
            "update_kl": (1.5 - 1 - math.log(1.5)) / 4,
        }
    )
    loss.backward()
    # Token 1's policy gradient is clipped away; the KL gives coef * d * weight. Token 2: -r A w importance + KL.
    assert new.grad.tolist() == pytest.approx([0.5 * 1.0 * 0.25, 1.0 * 0.5 * 0.75 + 0.5 * 2.0 * 0.75])
    assert tokens.entropy.grad.tolist() == pytest.approx([-0.1 * 0.25, -0.1 * 0.75])


def _random_batch(lengths, aggregation, correction=CORRECTIONS[0]):
    generator = torch.Generator().manual_seed(1)
    count = int(lengths.sum())

    def sample():
        return -torch.rand(count, generator=generator, dtype=torch.float64) * 3

    old = sample()
    corrected = correct_mismatch(old, old + 0.1 * sample(), lengths, correction)
    return PolicyTokens(
        new_logprobs=old + 0.3 * sample() + 0.4,
        entropy=-sample(),
        old_logprobs=old,
        importance=corrected.weights,
        ref_logprobs=sample(),
        advantages=torch.randn(len(lengths), generator=generator, dtype=torch.float64).repeat_interleave(lengths),
        weights=token_weights(lengths, aggregation, corrected.kept),
        lengths=lengths,
        total_tokens=int(corrected.kept.sum()),
    )


NAMES = ("new_logprobs", "entropy", "old_logprobs", "importance", "ref_logprobs", "advantages", "weights")


def _part(tokens, start, stop):
    return replace(tokens, **{name: getattr(tokens, name)[start:stop] for name in NAMES})


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_loss_gradient_and_metrics_do_not_depend_on_the_micro_batches(aggregation, correction):
    lengths = torch.tensor([1, 4, 2, 0, 7, 1])
    whole = _random_batch(lengths, aggregation, correction)
    whole.new_logprobs.requires_grad_()
    loss, metrics = policy_objective(whole, FULL)
    (gradient,) = torch.autograd.grad(loss, whole.new_logprobs)

    for cuts in ([0, 1, 5, 7, 14, 15], [0, 7, 15], [0, 0, 15]):
        losses, gradients, sums = [], [], dict.fromkeys(metrics, 0.0)
        for start, stop in zip(cuts, cuts[1:], strict=False):
            part = _part(whole, start, stop)
            new = part.new_logprobs.detach().requires_grad_()
            part_loss, part_metrics = policy_objective(replace(part, new_logprobs=new), FULL)
            losses.append(part_loss)
            gradients.append(torch.autograd.grad(part_loss, new)[0])
            sums = {name: sums[name] + part_metrics[name].item() for name in metrics}
        torch.testing.assert_close(sum(losses), loss)
        torch.testing.assert_close(torch.cat(gradients), gradient)
        assert sums == pytest.approx({name: value.item() for name, value in metrics.items()})


@pytest.mark.parametrize("correction", [form for form in CORRECTIONS if form.kind == "mask"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_rejected_tokens_change_neither_loss_nor_gradient_nor_metrics(aggregation, correction):
    lengths = torch.tensor([1, 4, 2, 0, 7, 1])
    batch = _random_batch(lengths, aggregation, correction)
    rejected = batch.weights == 0
    assert 0 < rejected.sum() < len(rejected)

    def learn(tokens):
        tokens.new_logprobs.requires_grad_()
        tokens.entropy.requires_grad_()
        loss, metrics = policy_objective(tokens, FULL)
        return loss, metrics, *torch.autograd.grad(loss, (tokens.new_logprobs, tokens.entropy))

    loss, metrics, *gradients = learn(batch)
    for gradient in gradients:
        assert (gradient[rejected] == 0).all()
        assert (gradient[~rejected] != 0).any()
    for value in (0.0, -50.0, -math.inf, math.nan):
        others = {name: getattr(batch, name).detach().clone() for name in NAMES}
        for name in set(NAMES) - {"weights"}:
            others[name][rejected] = value
        other_loss, other_metrics, *other_gradients = learn(replace(batch, **others))
        assert other_loss.item() == loss.item()
        assert other_metrics == metrics
        for gradient, other in zip(gradients, other_gradients, strict=True):
            assert torch.equal(gradient, other)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_rejecting_tokens_is_training_without_them(aggregation):
    lengths = torch.tensor([1, 4, 2, 0, 7, 1])
    correction = CorrectionConfig(kind="mask", cap=1.15)
    batch = _random_batch(lengths, aggregation, correction)
    kept = batch.weights > 0
    remaining = torch.stack([part.sum() for part in kept.split(lengths.tolist())])
    shorter = replace(batch, **{name: getattr(batch, name)[kept] for name in NAMES})
    shorter = replace(shorter, weights=token_weights(remaining, aggregation))
    expected, expected_metrics = policy_objective(shorter, FULL)
    loss, metrics = policy_objective(batch, FULL)
    assert loss.item() == pytest.approx(expected.item())
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(
        {name: value.item() for name, value in expected_metrics.items()}
    )


def test_a_batch_that_is_rejected_whole_has_loss_and_gradient_0():
    batch = _random_batch(torch.tensor([3, 2]), "token-mean")
    batch = replace(batch, weights=torch.zeros(5), total_tokens=0)
    batch.new_logprobs.requires_grad_()
    loss, metrics = policy_objective(batch, FULL)
    loss.backward()
    assert loss.item() == 0
    assert batch.new_logprobs.grad.tolist() == [0] * 5
    assert {value.item() for value in metrics.values()} == {0}


def test_kl_without_reference_log_probs_is_an_error():
    batch = replace(_random_batch(torch.tensor([2]), "token-mean"), ref_logprobs=None)
    with pytest.raises(ValueError, match="ref_logprobs"):
        policy_objective(batch, FULL)
    loss, metrics = policy_objective(batch, load_algorithm(AlgorithmConfig()))
    assert torch.isfinite(loss)
    assert "kl" not in metrics
