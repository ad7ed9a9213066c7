"""What is measured per precision, and the warning about quantization without a correction."""

import logging

import pytest
import torch

from megatron_rl.algorithms import correct_mismatch
from megatron_rl.config import Config
from megatron_rl.config.algorithm import CorrectionConfig
from megatron_rl.config.rollout import RolloutConfig
from megatron_rl.generation.precision_metrics import gap_metrics, generation_metrics, warn_of_bias
from rollout.fleet.mixed_precision import PrecisionCounts
from rollout.types import Rollout


def rollout(*precisions: tuple[str, int]) -> Rollout:
    count = sum(tokens for _, tokens in precisions)
    return Rollout("p", 0, 0, 1, [5], [6] * count, [-1.0] * count, "stop", 0, [], list(precisions))


ROLLOUTS = [rollout(("int8", 3)), rollout(("none", 2)), rollout(("int8", 2), ("none", 1))]


def test_tokens_seconds_and_speed_are_counted_per_precision() -> None:
    counts = PrecisionCounts({"int8": 2.0}, discarded=4)
    options = RolloutConfig(engines=3, quantization=["int8", "none", "fp8"])
    assert generation_metrics(ROLLOUTS, counts, options) == {
        "precision/discarded_tokens": 4,
        "precision/int8/tokens": 5,
        "precision/int8/seconds": 2,
        "precision/int8/tokens_per_s": 2.5,
        "precision/none/tokens": 3,
        "precision/none/seconds": 0,
        "precision/fp8/tokens": 0,
        "precision/fp8/seconds": 0,
    }


def test_what_quantization_saved_is_judged_by_the_unquantized_engines() -> None:
    counts = PrecisionCounts({"int8": 2.0, "none": 6.0})
    options = RolloutConfig(engines=2, quantization=["int8", "none"])
    metrics = generation_metrics(ROLLOUTS, counts, options)
    assert metrics["saved/quantization_s"] == (5 * 2.0 - 2.0) / 2, "5 tokens at 2 s each, in 2 s; 2 engines"
    tail = options.model_copy(update={"precision_tail": 0.1})
    assert "saved/quantization_s" not in generation_metrics(ROLLOUTS, counts, tail)


def test_the_gap_is_that_of_the_engine_that_sampled_the_token() -> None:
    engines = torch.tensor([-1.0] * 8)
    gap = torch.tensor([0.1, 0.2, 0.3, 0.0, 0.0, 1.0, 0.4, 0.0])  # tokens 3, 4 and 7 are unquantized
    trainer = engines + gap
    correction = correct_mismatch(trainer, engines, torch.tensor([3, 2, 3]), CorrectionConfig(cap=2.0))
    metrics = gap_metrics(ROLLOUTS, trainer, engines, correction)
    assert metrics == pytest.approx(
        {
            "precision/int8/logprob_gap_mean": 0.4,
            "precision/int8/logprob_gap_max": 1.0,
            "precision/int8/clipped_fraction": 0.2,  # exp(1) alone is above 2
            "precision/int8/rejected_fraction": 0.0,
            "precision/none/logprob_gap_mean": 0.0,
            "precision/none/logprob_gap_max": 0.0,
            "precision/none/clipped_fraction": 0.0,
            "precision/none/rejected_fraction": 0.0,
        },
        abs=1e-6,
    )


def test_one_precision_is_not_split() -> None:
    values = torch.zeros(3)
    correction = correct_mismatch(values, values, torch.tensor([3]), CorrectionConfig())
    assert gap_metrics(ROLLOUTS[:1], values, values, correction) == {}


@pytest.mark.parametrize(
    ("quantization", "kind", "lines"),
    [("int8", "none", 1), (["none", "int8"], "none", 1), ("int8", "tis", 0), ("none", "none", 0)],
)
def test_quantization_without_a_correction_is_warned_of(
    quantization: object, kind: str, lines: int, caplog: pytest.LogCaptureFixture
) -> None:
    config = Config.model_validate(
        {
            "model": {"path": "m"},
            "algorithm": {"correction": {"kind": kind}},
            "rollout": {"quantization": quantization, "engines": 2},
            "run_dir": "r",
        }
    )
    with caplog.at_level(logging.WARNING):
        warn_of_bias(config)
    assert len(caplog.records) == lines
    assert all("rollout.quantization=int8" in record.getMessage() for record in caplog.records)
