"""Metrics of a step's rollouts, and names of what an evaluation measures."""

from collections.abc import Mapping
from typing import Any

import torch

from megatron_rl.evaluation.statistics import Estimate
from megatron_rl.metrics import Metrics
from rollout.types import Rollout

PERCENTILES = (5, 25, 50, 75, 95)


def named_by_k(summary: Mapping[str, Estimate], samples: int) -> Metrics:
    """What is measured with all `samples` responses, by names that do not depend on their number (`KINDS`)."""
    names = {"greedy_accuracy": "greedy_accuracy"}
    names |= {f"{kind}@{samples}": f"{kind}_at_k" for kind in ("avg", "pass", "majority")}
    return {names[name]: estimate.value for name, estimate in summary.items() if name in names}


def rollout_metrics(rollouts: list[Rollout], rewards: list[float], seconds: float) -> Metrics:
    """`reward/*`, `response/*` and `throughput/generated_tokens_per_s` of `docs/metrics.md`.

    Args:
        rollouts: of the step.
        rewards: one per rollout, penalties included.
        seconds: that their generation took.
    """
    lengths = torch.tensor([len(rollout.token_ids) for rollout in rollouts], dtype=torch.float64)
    reward = torch.tensor(rewards, dtype=torch.float64)
    metrics: dict[str, Any] = {
        "reward/mean": reward.mean(),
        "reward/std": reward.std(correction=0),
        "response/length_mean": lengths.mean(),
        "response/length_max": lengths.max(),
        "response/truncated_fraction": sum(rollout.finish_reason == "length" for rollout in rollouts) / len(rollouts),
        "throughput/generated_tokens_per_s": lengths.sum() / seconds,
    }
    for percent in PERCENTILES:
        metrics[f"response/length_p{percent}"] = torch.quantile(lengths, percent / 100)
    return {name: float(value) for name, value in metrics.items()}
