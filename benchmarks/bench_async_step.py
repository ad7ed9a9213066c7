"""Generation one step ahead of training (`rollout.async_steps=1`), beside synchronous steps.

    python benchmarks/bench_async_step.py [--quick] [--json FILE]

Two runs of the demo (`make demo` makes its base model), from the same weights, with the same prompts and seeds. Seconds
are medians over the steps from the third one on: the first step of a run has nothing to overlap with, and fills caches.
`training waits` is for rollouts, `engines wait` for the trainer; a synchronous run does all of the first (its time of
generation) and, while it trains, all of the second. `stale` is how many updates older than the policy in training the
weights were that sampled a token, mean over tokens; accuracy is greedy, on held-out problems, before and after the run.

`async_vs_sync_step` is seconds of a synchronous step by those of an asynchronous one: above 1, overlap is faster. On a
machine where engines and trainer share the cores they slow each other down, and only idle cores are a gain.
"""

import argparse
import shutil
import statistics
from dataclasses import dataclass
from pathlib import Path

from _common import finish, parse_training_arguments, run_benchmark, run_command, training_parser
from megatron_rl.observability.metrics_logger import read_metrics

ACCURACY = "eval/arithmetic-heldout/greedy_accuracy"
WARM_UP = 2  # steps


@dataclass(frozen=True)
class Run:
    """What a run's metrics say: medians over its steps, in seconds, and the ends."""

    step: float
    training_waits: float
    engines_wait: float
    staleness: float
    reward: float
    accuracy_before: float
    accuracy: float

    @classmethod
    def of(cls, run_dir: Path) -> "Run":
        """The finished run in a folder."""
        records = read_metrics(run_dir)
        steps = [record for record in records if record["step"] > WARM_UP]

        def median(name: str, otherwise: str) -> float:
            return statistics.median(record.get(name, record.get(otherwise, 0.0)) for record in steps)

        busy = statistics.median(record["time/step"] - record["time/generate"] for record in steps)
        overlaps = "overlap/engines_waited_s" in steps[-1]
        return cls(
            step=median("time/step", ""),
            training_waits=median("overlap/training_waited_s", "time/generate"),
            engines_wait=median("overlap/engines_waited_s", "") if overlaps else busy,
            staleness=statistics.fmean(record.get("staleness/mean", 0.0) for record in steps),
            reward=statistics.fmean(record["reward/mean"] for record in steps[-4:]),
            accuracy_before=records[0][ACCURACY],
            accuracy=records[-1][ACCURACY],
        )

    def row(self, name: str) -> dict[str, float | str]:
        """A line of the table."""
        return {
            "rollouts": name,
            "step [s]": self.step,
            "training waits [s]": self.training_waits,
            "engines wait [s]": self.engines_wait,
            "stale": self.staleness,
            "reward, last 4": self.reward,
            "accuracy before": self.accuracy_before,
            "accuracy after": self.accuracy,
        }


def train(flags: argparse.Namespace, name: str, async_steps: int) -> Run:
    """One run."""
    run_dir = flags.work / name
    shutil.rmtree(run_dir, ignore_errors=True)
    overrides = [
        f"rollout.async_steps={async_steps}",
        "eval={every: 0, samples: 0}",
        "checkpoint={every: 0, export_hf: false}",
        "track.report=false",
        f"run_dir={run_dir}",
    ]
    if flags.quick:
        overrides += ["train.steps=5", "eval.max_prompts=64"]
    run_command("train", "-c", flags.config, *overrides, *flags.override)
    return Run.of(run_dir)


def main() -> None:
    """Train, compare, report."""
    flags = parse_training_arguments(training_parser(__doc__, "five steps each", "runs/bench-async"))
    runs = {"synchronous": train(flags, "synchronous", 0), "one step ahead": train(flags, "ahead", 1)}
    sync, ahead = runs.values()
    ratios = {
        "async_vs_sync_step": sync.step / ahead.step,
        "async_accuracy_difference": ahead.accuracy - sync.accuracy,
    }
    finish(flags, ratios, [run.row(name) for name, run in runs.items()])


if __name__ == "__main__":
    run_benchmark(main)
