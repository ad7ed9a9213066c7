"""Metrics of a step from what its parts measured."""

import math

import pytest
import torch

from megatron_rl.algorithms import TokenCorrection
from megatron_rl.config import Config
from megatron_rl.generation.generator import ScoredRollouts
from megatron_rl.step_metrics import step_metrics
from megatron_rl.trainer.batch import Batch
from megatron_rl.trainer.trainer import UpdateResult

OLD, ROLLOUT, REF = [-1.0, -2.0, -0.5], [-1.0, -1.0, -1.0], [-2.0, -2.0, -2.0]
UPDATE = {"policy_loss": 0.1, "entropy": 0.2, "clip_fraction": 0.3, "update_kl": 0.4, "grad_norm": 0.5, "lr": 0.6}


def make_config(**algorithm: object) -> Config:
    sections = {"model": {"path": "m"}, "data": {"max_prompt_tokens": 8}, "rollout": {"max_tokens": 8}, "run_dir": "r"}
    train = {"num_minibatches": 2, "prompts_per_step": 2}
    return Config.model_validate(sections | {"train": train, "algorithm": algorithm})


def batch() -> Batch:
    values = {"old_logprobs": OLD, "rollout_logprobs": ROLLOUT, "ref_logprobs": REF}
    return Batch([[1, 2], [3]], [[4, 5], [6]], {name: torch.tensor(value) for name, value in values.items()})


def update(**metrics: float) -> UpdateResult:
    kept = torch.tensor([True, True, False])
    correction = TokenCorrection(torch.tensor([1.0, 0.5, 0.0]), kept, ~kept, torch.zeros(2, dtype=torch.bool))
    own = {"skipped": 0.5, "not_finite": 1.0}
    return UpdateResult(UPDATE | own | metrics, correction, batch().values["old_logprobs"])


SCORED = ScoredRollouts([], [], {"reward/mean": 3.0})


def test_a_step_without_an_update_reports_rollouts_gap_and_times() -> None:
    metrics = step_metrics(make_config(), SCORED, batch(), None, {"time/step": 9.0})
    assert metrics["reward/mean"] == 3.0 and metrics["time/step"] == 9.0
    assert metrics["logprob_gap/mean"] == pytest.approx(0.5) and metrics["logprob_gap/max"] == 1.0
    assert not any(name.startswith(("loss/", "optim/", "correction/weight")) for name in metrics)


def test_updates_that_were_skipped_are_counted_over_mini_batches() -> None:
    metrics = step_metrics(make_config(), SCORED, batch(), update(), {"time/update": 2.0})
    assert metrics["correction/skipped_updates"] == 1.0 and metrics["optim/skipped_updates"] == 2.0
    assert metrics["loss/policy"] == 0.1 and metrics["optim/lr"] == 0.6
    assert metrics["correction/weight_mean"] == pytest.approx(0.75)
    assert metrics["correction/rejected_fraction"] == pytest.approx(1 / 3)
    assert metrics["throughput/trained_tokens_per_s"] == 3.0, "6 tokens of prompts and responses in 2 s"
    assert "loss/kl" not in metrics


def test_what_only_some_updates_measure_is_passed_on() -> None:
    metrics = step_metrics(
        make_config(), SCORED, batch(), update(kl=0.7, **{"moe/load_max": 2.0}), {"time/update": 2.0}
    )
    assert metrics["loss/kl"] == 0.7 and metrics["moe/load_max"] == 2.0


def test_a_penalty_in_the_reward_reports_its_divergence() -> None:
    kl = {"coef": 0.1, "place": "reward", "estimator": "k1"}
    metrics = step_metrics(make_config(name="ppo", kl=kl), SCORED, batch(), None, {})
    expected = sum(old - ref for old, ref in zip(OLD, REF, strict=True)) / 3
    assert math.isclose(metrics["reward/kl"], expected, rel_tol=1e-6)
