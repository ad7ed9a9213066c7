"""What a mixed fleet's engines did and how far they are from the trainer, split by precision."""

import logging
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from megatron_rl.algorithms import TokenCorrection, mismatch_metrics
from megatron_rl.config import Config
from megatron_rl.config.rollout import RolloutConfig
from megatron_rl.metrics import Metrics
from rollout.fleet.mixed_precision import PrecisionCounts
from rollout.types import Rollout

log = logging.getLogger(__name__)


def warn_of_bias(config: Config) -> None:
    """A line in the log when engines sample from another distribution than the trainer's and nothing corrects it."""
    if config.algorithm.correction.kind != "none":
        return
    if setting := config.rollout.overlap_setting:
        log.warning(
            f"{setting} with algorithm.correction.kind=none: older policies have sampled the tokens and nothing "
            "corrects it; set algorithm.correction.kind=tis, or watch staleness/mean and correction/kl."
        )
    quantized = [precision for precision in config.rollout.precisions if precision != "none"]
    if quantized:
        log.warning(
            f"rollout.quantization={quantized[0]} with algorithm.correction.kind=none: engines and trainer disagree "
            "about the policy and nothing corrects it; set algorithm.correction.kind=tis, or watch logprob_gap/mean."
        )


def generation_metrics(rollouts: Sequence[Rollout], counts: PrecisionCounts, options: RolloutConfig) -> Metrics:
    """`precision/*` and `saved/quantization_s` of `docs/metrics.md`, as far as a generation gives them.

    Args:
        rollouts: of the step.
        counts: of the same step.
        options: of the fleet.
    """
    precisions = options.precisions
    metrics = {"precision/discarded_tokens": float(counts.discarded)}
    for precision in sorted(set(precisions)):
        tokens = float(sum(count for rollout in rollouts for name, count in rollout.precisions if name == precision))
        seconds = counts.seconds.get(precision, 0.0)
        metrics |= {f"precision/{precision}/tokens": tokens, f"precision/{precision}/seconds": seconds}
        if seconds:
            metrics[f"precision/{precision}/tokens_per_s"] = tokens / seconds
    unquantized = metrics.get("precision/none/tokens_per_s")
    if unquantized and not options.precision_tail:  # the engines of a tail have few requests at a time, and so are slow
        quantized = [precision for precision in counts.seconds if precision != "none"]
        tokens, seconds = (
            sum(metrics[f"precision/{precision}/{name}"] for precision in quantized) for name in ("tokens", "seconds")
        )
        metrics["saved/quantization_s"] = (tokens / unquantized - seconds) / len(precisions)
    return metrics


def gap_metrics(
    rollouts: Sequence[Rollout],
    old: Float[Tensor, "tokens"],
    rollout: Float[Tensor, "tokens"],
    correction: TokenCorrection,
) -> Metrics:
    """`precision/*` of `docs/metrics.md` that compare engines and trainer; nothing if all tokens have one precision.

    Args:
        rollouts: those that the log-probs belong to, one after the other.
        old: the trainer's log-probs before the update.
        rollout: the engines' log-probs.
        correction: what the correction made of these tokens.
    """
    spans = [span for rollout in rollouts for span in rollout.precisions]
    names = sorted({name for name, _ in spans})
    if len(names) < 2:
        return {}
    metrics: Metrics = {}
    numbers = torch.tensor([names.index(name) for name, _ in spans])
    whose = numbers.repeat_interleave(torch.tensor([count for _, count in spans]))
    for number, name in enumerate(names):
        own = whose == number
        gap = mismatch_metrics(old[own], rollout[own])
        metrics |= {
            f"precision/{name}/logprob_gap_mean": gap["mean_abs"],
            f"precision/{name}/logprob_gap_max": gap["max_abs"],
            f"precision/{name}/clipped_fraction": correction.clipped[own].double().mean().item(),
            f"precision/{name}/rejected_fraction": (~correction.kept[own]).double().mean().item(),
        }
    return metrics
