"""Reuse of earlier responses over the epochs of the demo task, beside generating everything anew.

    python benchmarks/bench_history.py [--quick] [--json FILE]

Runs of the demo task (`make demo` makes its base model) on few enough prompts to see each several times: with
`rollout.history.mode` off, coupled, and lenient with lenience 0.5 and 0. All start from the same weights and visit the
same prompts; speculation is off. `generated` are the tokens that do not come from a sample's own earlier response, and
`decode steps` how often a response was in an engine step, which for plain decoding is once per token. Both, the seconds
and `reused` are from the second epoch on; accuracy is greedy, on held-out problems, after the last step.

Ratios are off by the other run: generated tokens and seconds of generation. For the decode steps of coupled, its own
tokens by its steps, because the responses of two runs grow to different lengths.
"""

import argparse
import shutil
from dataclasses import dataclass
from pathlib import Path

from _common import finish, parse_training_arguments, run_benchmark, run_command, training_parser
from megatron_rl.config import load_config
from megatron_rl.observability.metrics_logger import read_metrics

VARIANTS = {
    "off": "{mode: off}",
    "coupled": "{mode: coupled}",
    "lenient 0.5": "{mode: lenient, lenience: 0.5}",
    "lenient 0.0": "{mode: lenient, lenience: 0.0}",
}
SHORT, FULL = {"prompts": 16, "epochs": 3}, {"prompts": 64, "epochs": 5}


@dataclass(frozen=True)
class Run:
    """What a run's metrics say, sums and means from its second epoch on."""

    tokens: float
    generated: float
    decode_steps: float
    rollout_seconds: float
    step_seconds: float
    distinct: float
    accuracy: float

    @classmethod
    def of(cls, run_dir: Path, steps_per_epoch: int, responses: int) -> "Run":
        """The finished run in a folder; `responses` are those of a step."""
        records = [record for record in read_metrics(run_dir) if record["step"] > steps_per_epoch]
        tokens = [record["response/length_mean"] * responses for record in records]
        pairs = list(zip(tokens, records, strict=True))
        return cls(
            tokens=sum(tokens),
            generated=sum(count - record.get("history/reused_tokens", 0.0) for count, record in pairs),
            decode_steps=sum(count / record.get("speculation/tokens_per_verification", 1.0) for count, record in pairs),
            rollout_seconds=sum(record["time/generate"] for record in records),
            step_seconds=sum(record["time/step"] for record in records),
            distinct=sum(record["group/distinct_responses"] for record in records) / len(records),
            accuracy=records[-1]["eval/arithmetic-heldout/greedy_accuracy"],
        )

    def row(self, name: str) -> dict[str, float | str]:
        """A line of the table."""
        return {
            "history": name,
            "tokens": round(self.tokens),
            "reused": 1 - self.generated / self.tokens,
            "generated": round(self.generated),
            "decode steps": round(self.decode_steps),
            "rollout [s]": self.rollout_seconds,
            "all steps [s]": self.step_seconds,
            "distinct": self.distinct,
            "accuracy": self.accuracy,
        }


def train(flags: argparse.Namespace, name: str, extent: dict[str, int]) -> Run:
    """One variant's run."""
    config = load_config(flags.config)
    run_dir = flags.work / name.replace(" ", "-")
    shutil.rmtree(run_dir, ignore_errors=True)
    steps_per_epoch = extent["prompts"] // config.train.prompts_per_step
    overrides = [
        f"data.arithmetic.train_size={extent['prompts']}",
        f"train.steps={steps_per_epoch * extent['epochs']}",
        f"rollout.history={VARIANTS[name]}",
        "rollout.speculation.adaptive=off",
        "eval={every: 0, samples: 0}",
        "checkpoint={every: 0, export_hf: false}",
        f"run_dir={run_dir}",
    ]
    run_command("train", "-c", flags.config, *overrides, *flags.override)
    return Run.of(run_dir, steps_per_epoch, config.train.prompts_per_step * config.algorithm.group_size)


def main() -> None:
    """Train, compare, report."""
    parser = training_parser(__doc__, "fewer prompts and epochs, and no lenience of 0", "runs/bench-history")
    flags = parse_training_arguments(parser)
    names = [name for name in VARIANTS if not flags.quick or name != "lenient 0.0"]
    runs = {name: train(flags, name, SHORT if flags.quick else FULL) for name in names}
    off, coupled, lenient = runs["off"], runs["coupled"], runs["lenient 0.5"]
    ratios = {
        "lenient_token_reduction": off.generated / lenient.generated,
        "lenient_rollout_speedup": off.rollout_seconds / lenient.rollout_seconds,
        "coupled_decode_step_reduction": coupled.tokens / coupled.decode_steps,
        "coupled_rollout_speedup": off.rollout_seconds / coupled.rollout_seconds,
        "lenient_accuracy_difference": lenient.accuracy - off.accuracy,
        "coupled_accuracy_difference": coupled.accuracy - off.accuracy,
    }
    finish(flags, ratios, [run.row(name) for name, run in runs.items()])


if __name__ == "__main__":
    run_benchmark(main)
