"""A drafter that follows the policy over RL steps, beside plain decoding, n-gram drafts and one that stands still.

    python benchmarks/bench_drafter.py [--quick] [--json FILE]

One run of the demo task (`make demo` makes its base model) starts from a warmed-up head and goes on training it. At
the start and after every few steps four engines generate the same responses with the weights of that step: one plain,
one with n-gram drafts, one with the head as it was warmed up (frozen), one with the head that the run's engines have
(adaptive). Drafts change no token, so one run stands for all four. Turns alternate; before each one n-gram forgets.

Tokens per second are those of the adaptive rule `thompson`, with as many requests at once as the run has, each as long
as it happens to be, so that few are live at the end. Acceptance lengths are tokens per verification with always
`drafter.unroll` drafts.

Ratios: tokens per second of adaptive by those of the others, over all measured steps but the first; acceptance
length of adaptive by that of frozen after the last step, and by its own at the start (`accept_adaptive_vs_start`).
"""

import argparse
import shutil
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _common import finish, parse_training_arguments, run_benchmark, run_command, training_parser
from megatron_rl.config import Config, load_config
from megatron_rl.data.prompts import load_prompts
from megatron_rl.drafting.bench import PLAIN, Turn, compare, make_requests, start_engine, take_turn
from megatron_rl.models.token_ids import load_tokenizer
from megatron_rl.observability.console import Console
from megatron_rl.observability.metrics_logger import read_metrics
from megatron_rl.observability.plots import acceptance_over_steps
from rollout.types import RolloutRequest

NGRAM, FROZEN, ADAPTIVE = "ngram", "frozen", "adaptive"
ALWAYS = ", always drafting"
SHORT = {"steps": 2, "every": 2, "rounds": 1, "updates": 5}
FULL = {"steps": 30, "every": 5, "rounds": 3, "updates": 150}


@dataclass(frozen=True)
class Point:
    """What was measured with the weights of one step."""

    step: int
    """Of the run; 0 is before it."""
    turns: dict[str, list[Turn]]
    """Of each variant."""
    heldout_length: float
    """Tokens per verification that the run measured for its head; NaN where it has not."""

    def accepted(self, drafter: str) -> float:
        """Tokens per verification of one head, with always as many drafts."""
        counts = [turn.counts for turn in self.turns[drafter + ALWAYS] if turn.counts is not None]
        return 1 + sum(c.accepted_at.total() for c in counts) / max(sum(c.tried_at[0] for c in counts), 1)

    def speeds(self, variant: str) -> list[float]:
        """Tokens per second of the variant by those of plain decoding, per round."""
        pairs = zip(self.turns[variant], self.turns[PLAIN], strict=True)
        return [(mine.tokens / mine.seconds) / (plain.tokens / plain.seconds) for mine, plain in pairs]


class Contest:
    """The engines at one step, for `megatron_rl.drafting.bench.compare`."""

    def __init__(self, config: Config, model: Path, heads: dict[str, Path]) -> None:
        kinds: dict[str, dict[str, Any]] = {
            PLAIN: {"adaptive": "off"},
            NGRAM: {"adaptive": "thompson", "drafters": ["ngram"]},
            **dict.fromkeys(heads, {"adaptive": "thompson", "drafters": ["eagle"]}),
        }
        self._engines = {}
        for name, speculation in kinds.items():
            values = config.model_dump()
            values["model"]["path"] = str(model)
            values["rollout"]["speculation"] |= speculation
            values["drafter"]["path"] = str(heads[name]) if name in heads else None
            values["run_dir"] = f"{config.run_dir}/{name}"
            self._engines[name] = start_engine(Config.model_validate(values), wait=False)
        for engine in self._engines.values():
            engine.wait_until_up()
        self._config = config

    def turn(self, variant: str, requests: list[RolloutRequest], concurrency: int | None = None) -> Turn:
        """One variant's generation."""
        name = variant.removesuffix(ALWAYS)
        always = f"static:eagle:{self._config.drafter.unroll}"
        rule = PLAIN if name == PLAIN else "thompson" if name == variant else always
        most = self._config.rollout.speculation.max_draft_tokens
        return take_turn(self._engines[name], rule, most, requests, concurrency)

    def close(self) -> None:
        """Stop the engines; the one that has started Ray goes last."""
        for engine in reversed(self._engines.values()):
            engine.shutdown()


def measure(config: Config, step: int, model: Path, heads: dict[str, Path], rounds: int, heldout: float) -> Point:
    """All variants on the prompts that follow the step."""
    prompts = load_prompts(config.data.train, config.data, load_tokenizer(str(model)), config.data.split, False)
    count = config.train.prompts_per_step * config.algorithm.group_size
    lengths = [config.rollout.max_tokens] * count
    contest = Contest(config, model, heads)
    variants, warmups = [PLAIN, NGRAM, *heads, *(head + ALWAYS for head in heads)], 1 if rounds == 1 else 2
    try:
        with Console(enabled=True).phase("measuring", (rounds + warmups) * len(variants)) as phase:
            turns = compare(
                contest,
                variants,
                lambda number: make_requests(prompts, number, lengths, config, config.algorithm.group_size, False),
                repetitions=rounds,
                first_round=step * 100,
                warmups=warmups,
                on_turn=lambda variant: phase.advance(note=f"step {step}, {variant}"),
            )
    finally:
        contest.close()
    return Point(step, turns, heldout)


def follow(flags: argparse.Namespace, extent: dict[str, int]) -> list[Point]:
    """Warm a head up, train policy and head, and measure on the way."""
    shutil.rmtree(flags.work, ignore_errors=True)
    overrides = [
        "rollout.speculation={adaptive: thompson, drafters: [eagle]}",
        f"drafter={{lr: {flags.lr}, unroll: 4, min_slices: {flags.slices}}}",
        "data.eval=[]",
        f"checkpoint.every={extent['every']}",
        *flags.override,
    ]
    warm = flags.work / "warm"
    sizes = ["--updates", str(extent["updates"]), "--batches", "2"]
    run_command("drafter", "warmup", "-c", flags.config, *sizes, *overrides, f"run_dir={warm}")
    frozen, run_dir = warm / "drafter", flags.work / "run"
    overrides += [f"run_dir={run_dir}", f"drafter.path={frozen}"]
    config = load_config(flags.config, overrides)
    base = Path(config.model.path)
    points = [measure(config, 0, base, {FROZEN: frozen, ADAPTIVE: frozen}, extent["rounds"], float("nan"))]
    for step in range(extent["every"], extent["steps"] + 1, extent["every"]):
        run_command("train", "-c", flags.config, *overrides, f"train.steps={step}")
        heads = {FROZEN: frozen, ADAPTIVE: run_dir / "drafter"}
        heldout = read_metrics(run_dir)[-1].get("drafter/heldout_length", float("nan"))
        points.append(measure(config, step, run_dir / "hf", heads, extent["rounds"], heldout))
    return points


def row(point: Point) -> dict[str, float | str]:
    """One line of the table."""
    same = all(
        {(r.prompt_id, r.sample_index): r.token_ids for r in mine.rollouts}
        == {(r.prompt_id, r.sample_index): r.token_ids for r in plain.rollouts}
        for turns in point.turns.values()
        for mine, plain in zip(turns, point.turns[PLAIN], strict=True)
    )
    return {
        "step": point.step,
        "plain tok/s": statistics.median(turn.tokens / turn.seconds for turn in point.turns[PLAIN]),
        **{f"{name} vs plain": statistics.median(point.speeds(name)) for name in (NGRAM, FROZEN, ADAPTIVE)},
        "frozen length": point.accepted(FROZEN),
        "adaptive length": point.accepted(ADAPTIVE),
        "held-out length": point.heldout_length,
        "same tokens": "yes" if same else "NO",
    }


def main() -> None:
    """Measure, print, draw."""
    parser = training_parser(__doc__, "two steps, one round", "runs/bench-drafter")
    parser.add_argument("--png", type=Path, default=Path("drafter.png"), help="lengths by step (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=1e-3, help="drafter.lr (default: %(default)s)")
    parser.add_argument("--slices", type=int, default=24, help="drafter.min_slices (default: %(default)s)")
    flags = parse_training_arguments(parser)
    points = follow(flags, SHORT if flags.quick else FULL)
    speeds = {
        name: [speed for point in points[1:] for speed in point.speeds(name)] for name in (NGRAM, FROZEN, ADAPTIVE)
    }
    last = points[-1]
    ratios = {
        "adaptive_vs_plain": statistics.median(speeds[ADAPTIVE]),
        "adaptive_vs_ngram": statistics.median(a / b for a, b in zip(speeds[ADAPTIVE], speeds[NGRAM], strict=True)),
        "adaptive_vs_frozen": statistics.median(a / b for a, b in zip(speeds[ADAPTIVE], speeds[FROZEN], strict=True)),
        "accept_adaptive_vs_frozen": last.accepted(ADAPTIVE) / last.accepted(FROZEN),
        "accept_adaptive_vs_start": last.accepted(ADAPTIVE) / points[0].accepted(ADAPTIVE),
    }
    finish(flags, ratios, [row(point) for point in points])
    lengths = {name: [point.accepted(name) for point in points] for name in (FROZEN, ADAPTIVE)}
    acceptance_over_steps([point.step for point in points], lengths, flags.png)
    print(f"acceptance lengths in {flags.png}")


if __name__ == "__main__":
    run_benchmark(main)
