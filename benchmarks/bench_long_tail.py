"""A batch whose responses have a long-tailed length distribution: plain, fixed numbers of drafts, adaptive speculation.

    python benchmarks/bench_long_tail.py [--quick] [--json FILE]

64 requests of given lengths (log-normal, a few of them very long; see `_model.long_tailed_lengths`) go in together, so
many are live at first and one or two at the end. The timeline of live requests and chosen arms is written as a PNG.
The model is the demo's (`make demo`), or the one that `--model` names; `--drafter` adds an EAGLE head.
"""

import argparse
import statistics
from pathlib import Path

import ray

from _common import benchmark_parser, finish, run_benchmark
from _model import long_tailed_lengths
from megatron_rl.config import Config, ConfigError
from megatron_rl.drafting.bench import PLAIN, SpeculationBench, Turn, compare, speeds
from megatron_rl.observability.console import Console
from megatron_rl.observability.plots import speculation_timeline
from rollout.speculation.eagle import kind_of

REQUESTS = 64
SAMPLES = 8
"""Requests per prompt."""


def parse() -> argparse.Namespace:
    """The flags of every benchmark, and this one's."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--model", default="runs/arithmetic/hf", help="model folder (default: %(default)s)")
    parser.add_argument("--drafter", metavar="FOLDER", help="EAGLE head of the model, in vLLM's format")
    parser.add_argument("--data", default="arithmetic", help="prompts, as data.train (default: %(default)s)")
    parser.add_argument("--longest", type=int, default=224, help="longest response, in tokens (default: %(default)s)")
    parser.add_argument("--precision", default="fp32", help="fp32 or bf16 (default: %(default)s)")
    parser.add_argument("--quantization", default="none", help="as rollout.quantization (default: %(default)s)")
    parser.add_argument("--png", type=Path, default=Path("long_tail.png"), help="timeline (default: %(default)s)")
    return parser.parse_args()


def build(flags: argparse.Namespace) -> SpeculationBench:
    """The engines. Raises ConfigError when the model is not there."""
    if not (Path(flags.model) / "config.json").is_file():
        raise ConfigError(f"{flags.model} holds no model; run `make demo` first, or name one with --model.")
    config = Config.model_validate(
        {
            "model": {"path": flags.model, "precision": flags.precision},
            "data": {"train": flags.data, "max_prompt_tokens": 32},
            "rollout": {
                "max_tokens": flags.longest,
                "quantization": flags.quantization,
                "vllm": {"enforce_eager": True, "max_num_seqs": REQUESTS},
                "speculation": {"adaptive": "thompson", "max_draft_tokens": 8, "drafters": _drafters(flags)},
            },
            "drafter": {"path": flags.drafter, "kind": kind_of(flags.drafter)} if flags.drafter else {},
            "run_dir": "runs/bench",
        }
    )
    return SpeculationBench(config)


def _drafters(flags: argparse.Namespace) -> list[str]:
    return ["eagle", "ngram"] if flags.drafter else ["ngram"]


def main() -> None:
    """Measure, print, draw."""
    flags = parse()
    bench = build(flags)
    lengths = long_tailed_lengths(REQUESTS, flags.longest)
    lengths_of_drafts = (2, 8) if flags.quick else (1, 2, 4, 8)
    fixed = [f"static:{drafter}:{k}" for drafter in _drafters(flags) for k in lengths_of_drafts]
    variants = [PLAIN, *fixed, *([] if flags.quick else ["epsilon_greedy"]), "thompson"]
    repetitions, warmups = 2 if flags.quick else 7, 3
    with Console(enabled=True).phase("measuring", (repetitions + warmups) * len(variants)) as phase:
        turns = compare(
            bench,
            variants,
            lambda number: bench.requests(number, lengths, SAMPLES),
            repetitions,
            first_round=0,
            warmups=warmups,
            on_turn=lambda variant: phase.advance(note=variant),
        )
    timeline = ray.get(bench.drafting.call(0, "speculation_timeline"))
    bench.close()
    speculation_timeline(timeline, flags.png)
    relative = speeds(turns)
    best = max(relative[variant] for variant in variants if variant.startswith("static"))
    ratios = {
        "long_tail_adaptive_vs_plain": relative["thompson"],
        "long_tail_adaptive_vs_best_static": relative["thompson"] / best,
    }
    finish(flags, ratios, [_row(variant, turns[variant], relative[variant]) for variant in variants])
    print(f"timeline in {flags.png}; {sum(lengths)} tokens a round, the longest response has {max(lengths)}")


def _row(variant: str, turns: list[Turn], relative: float) -> dict[str, float | str]:
    counts = [turn.counts for turn in turns if turn.counts is not None]
    return {
        "variant": variant,
        "seconds": statistics.median(turn.seconds for turn in turns),
        "tokens/s": statistics.median(turn.tokens / turn.seconds for turn in turns),
        "vs plain": relative,
        "tokens from drafts": sum(c.accepted for c in counts) / max(sum(c.emitted for c in counts), 1),
        "accepted share of drafts": sum(c.accepted for c in counts) / max(sum(c.drafted for c in counts), 1),
    }


if __name__ == "__main__":
    run_benchmark(main)
