"""What drafts gave in a step: metrics of the fleet's counts, and an alarm about a head that is hardly ever right."""

import logging
from collections import Counter
from collections.abc import Sequence

from megatron_rl.config.rollout import RolloutConfig
from megatron_rl.metrics import Metrics
from rollout.speculation.arms import EAGLE
from rollout.types import HISTORY, SUFFIX, Rollout, SpeculationCounts, TokenSource

log = logging.getLogger(__name__)


def drafter_names(options: RolloutConfig) -> list[str]:
    """The drafters that the section `rollout` asks for."""
    drafters: list[str] = [*options.speculation.drafters] if options.speculation.adaptive != "off" else []
    return drafters + ([HISTORY, SUFFIX] if options.history.mode != "off" else [])


def speculation_metrics(
    rollouts: Sequence[Rollout], counts: Sequence[SpeculationCounts], drafters: Sequence[str]
) -> Metrics:
    """`speculation/*`, `saved/*` and `drafter/live_*` of `docs/metrics.md`; nothing without counts.

    Args:
        rollouts: of the step.
        counts: of the same step, one per engine.
        drafters: those in use, see `drafter_names`.
    """
    if not counts:
        return {}
    tokens = sum(len(rollout.token_ids) for rollout in rollouts)
    from_drafts = sum(source == TokenSource.DRAFT for rollout in rollouts for source in rollout.sources)
    drafted = sum(count.drafted for count in counts)
    seconds = sum(count.seconds for count in counts)
    metrics = {
        "speculation/draft_token_fraction": from_drafts / tokens,
        "speculation/tokens_per_verification": sum(count.emitted for count in counts)
        / max(sum(count.verifications for count in counts), 1),
        "speculation/accepted_fraction": sum(count.accepted for count in counts) / max(drafted, 1),
        "speculation/draft_time_fraction": sum(count.draft_seconds for count in counts) / max(seconds, 1e-9),
    }
    for drafter in drafters:
        drafted = sum(count.drafted_by[drafter] for count in counts)
        metrics[f"speculation/drafted/{drafter}"] = float(drafted)
        if drafted:
            accepted = sum(count.accepted_by[drafter] for count in counts)
            metrics[f"speculation/accepted_fraction/{drafter}"] = accepted / drafted
    chosen = sum((count.chosen for count in counts), start=Counter[tuple[int, str]]())
    for (bucket, arm), steps in sorted(chosen.items()):
        metrics[f"speculation/steps/batch_{bucket}/{arm}"] = float(steps)
    metrics |= _savings(counts)
    if HISTORY in drafters:
        metrics["history/verify_seconds"] = sum(count.history_seconds for count in counts) / len(counts)
    return metrics | (_live_metrics(counts) if EAGLE in drafters else {})


def _savings(counts: Sequence[SpeculationCounts]) -> Metrics:
    """Seconds that accepted tokens saved, mean over the engines."""
    reuse = drafting = 0.0
    for count in counts:
        for drafter, seconds in count.saved_by.items():
            if drafter in (HISTORY, SUFFIX):
                reuse += seconds
            else:
                drafting += seconds
    return {"saved/reuse_s": reuse / len(counts), "saved/drafting_s": drafting / len(counts)}


def _live_metrics(counts: Sequence[SpeculationCounts]) -> Metrics:
    """How the head's drafts fared; the steps of other drafters and plain ones say nothing about the head."""
    tried = sum((count.tried_at for count in counts), start=Counter[int]())
    accepted = sum((count.accepted_at for count in counts), start=Counter[int]())
    metrics = {"drafter/live_drafts": float(tried[0])}
    if tried[0]:
        metrics["drafter/live_length"] = 1 + accepted.total() / tried[0]
    for position in sorted(tried):
        metrics[f"drafter/live_accepted_{position + 1}"] = accepted[position] / tried[position]
    return metrics
