"""The metrics of a step, by the names of `docs/metrics.md`: put together from what its parts measured."""

from megatron_rl.algorithms import mismatch_metrics
from megatron_rl.algorithms.step import reward_kl
from megatron_rl.config import Config
from megatron_rl.generation.generator import ScoredRollouts
from megatron_rl.generation.precision_metrics import gap_metrics
from megatron_rl.metrics import Metrics
from megatron_rl.trainer.batch import Batch
from megatron_rl.trainer.trainer import UpdateResult


def step_metrics(
    config: Config, scored: ScoredRollouts, batch: Batch, update: UpdateResult | None, seconds: Metrics
) -> Metrics:
    """All that a step measured but what the weight sync, the critic and the drafter did. On the driver.

    Args:
        config: the experiment.
        scored: the step's rollouts.
        batch: the same as a batch, with all that is known of its tokens.
        update: the policy's; None in a step without one.
        seconds: of the step and its phases.
    """
    gap = mismatch_metrics(batch.values["old_logprobs"], batch.values["rollout_logprobs"])
    metrics = scored.metrics | {
        "logprob_gap/mean": gap["mean_abs"],
        "logprob_gap/max": gap["max_abs"],
        "correction/ess": gap["ess"],
        "correction/kl": gap["kl"],
    }
    kl = config.algorithm.kl
    if kl.coef > 0 and kl.place == "reward":
        metrics["reward/kl"] = reward_kl(batch.values, kl).mean().item()
    if update is not None:
        metrics |= _correction_metrics(scored, batch, update) | _update_metrics(config, update.metrics)
        metrics["throughput/trained_tokens_per_s"] = batch.sequence_tokens / seconds["time/update"]
    return metrics | seconds


def _correction_metrics(scored: ScoredRollouts, batch: Batch, update: UpdateResult) -> Metrics:
    """How far engines and trainer are apart, by precision, and what was done about it."""
    old, rollout, correction = batch.values["old_logprobs"], batch.values["rollout_logprobs"], update.correction
    metrics = {f"correction/{name}": value for name, value in correction.metrics().items()}
    return metrics | gap_metrics(scored.rollouts, old, rollout, correction)


def _update_metrics(config: Config, update: Metrics) -> Metrics:
    """What the optimizer steps measured; their numbers are sums over mini-batches where `update` has means."""
    metrics = {
        "correction/skipped_updates": update["skipped"] * config.train.num_minibatches,
        "loss/policy": update["policy_loss"],
        "loss/entropy": update["entropy"],
        "loss/clip_fraction": update["clip_fraction"],
        "loss/update_kl": update["update_kl"],
        "optim/grad_norm": update["grad_norm"],
        "optim/lr": update["lr"],
        "optim/skipped_updates": update["not_finite"] * config.train.num_minibatches,
    }
    if "kl" in update:
        metrics["loss/kl"] = update["kl"]
    return metrics | {name: value for name, value in update.items() if name.startswith("moe/")}
