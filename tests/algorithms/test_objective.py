import math
from dataclasses import replace

import pytest
import torch

from megatron_rl.algorithms import PolicyTokens, policy_objective, token_weights
from megatron_rl.config.schema import Algorithm, Correction, Kl

FULL = Algorithm(
    clip_low=0.2,
    clip_high=0.3,
    dual_clip=3.0,
    entropy_coef=0.1,
    kl=Kl(coef=0.5, estimator="k2"),
    correction=Correction(kind="tis", cap=2.0),
)


def _log(*values):
    return torch.tensor(values, dtype=torch.float64).log()


def test_all_terms_by_hand():
    old = _log(0.5, 0.5)
    new = (old + _log(1.5, 1.0)).requires_grad_()
    tokens = PolicyTokens(
        new_logprobs=new,
        entropy=torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True),
        old_logprobs=old,
        rollout_logprobs=old - _log(4.0, 0.5),
        ref_logprobs=new.detach() - torch.tensor([1.0, 2.0], dtype=torch.float64),
        advantages=torch.tensor([2.0, -1.0], dtype=torch.float64),
        weights=torch.tensor([0.25, 0.75], dtype=torch.float64),
        total_tokens=4,
    )
    loss, metrics = policy_objective(tokens, FULL)
    # Token 1: r = 1.5 clipped at 1.3, -2.6; importance weight min(4, 2) = 2; KL 1/2; entropy 1.
    # Token 2: r = 1, 1.0; importance weight 1/2; KL 2; entropy 2.
    policy = 0.25 * (-2.6 * 2) + 0.75 * (1.0 * 0.5)
    assert loss.item() == pytest.approx(policy + 0.5 * (0.25 * 0.5 + 0.75 * 2) - 0.1 * (0.25 * 1 + 0.75 * 2))
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(
        {
            "loss": loss.item(),
            "policy_loss": policy,
            "clip_share": 1 / 4,
            "entropy": 3 / 4,
            "tis_weight": 2.5 / 4,
            "kl": 2.5 / 4,
            "update_kl": (1.5 - 1 - math.log(1.5)) / 4,
        }
    )
    loss.backward()
    # Token 1's policy gradient is clipped away; the KL gives coef * d * weight. Token 2: -r A w tis + KL.
    assert new.grad.tolist() == pytest.approx([0.5 * 1.0 * 0.25, 1.0 * 0.5 * 0.75 + 0.5 * 2.0 * 0.75])
    assert tokens.entropy.grad.tolist() == pytest.approx([-0.1 * 0.25, -0.1 * 0.75])


def _random_batch(lengths, aggregation):
    generator = torch.Generator().manual_seed(1)
    count = int(lengths.sum())

    def sample():
        return -torch.rand(count, generator=generator, dtype=torch.float64) * 3

    old = sample()
    return PolicyTokens(
        new_logprobs=old + 0.3 * sample() + 0.4,
        entropy=-sample(),
        old_logprobs=old,
        rollout_logprobs=old + 0.1 * sample(),
        ref_logprobs=sample(),
        advantages=torch.randn(len(lengths), generator=generator, dtype=torch.float64).repeat_interleave(lengths),
        weights=token_weights(lengths, aggregation),
        total_tokens=count,
    )


def _part(tokens, start, stop):
    names = ("new_logprobs", "entropy", "old_logprobs", "rollout_logprobs", "ref_logprobs", "advantages", "weights")
    return replace(tokens, **{name: getattr(tokens, name)[start:stop] for name in names})


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"])
def test_loss_gradient_and_metrics_do_not_depend_on_the_micro_batches(aggregation):
    lengths = torch.tensor([1, 4, 2, 0, 7, 1])
    whole = _random_batch(lengths, aggregation)
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


def test_correction_off_ignores_the_engine_log_probs():
    batch = _random_batch(torch.tensor([3, 2]), "token-mean")
    plain = Algorithm(correction=Correction(kind="none"))
    loss, metrics = policy_objective(batch, plain)
    other, _ = policy_objective(replace(batch, rollout_logprobs=batch.rollout_logprobs - 1), plain)
    assert loss.item() == other.item()
    assert "tis_weight" not in metrics
    corrected, _ = policy_objective(batch, Algorithm())
    assert corrected.item() != pytest.approx(loss.item())


def test_kl_without_reference_log_probs_is_an_error():
    batch = replace(_random_batch(torch.tensor([2]), "token-mean"), ref_logprobs=None)
    with pytest.raises(ValueError, match="ref_logprobs"):
        policy_objective(batch, FULL)
    loss, metrics = policy_objective(batch, Algorithm())
    assert torch.isfinite(loss)
    assert "kl" not in metrics
