"""What every benchmark shares: arguments, side-by-side timing, the table, and the JSON.

A ratio is always between things measured side by side in the same run: `measure` interleaves the repetitions of all
cases, so that a neighbour on the machine slows all of them alike.

    arguments = parse_arguments(__doc__)
    seconds = measure({"sync": sync, "memcpy": memcpy}, repetitions=5 if arguments.quick else 20)
    finish(arguments, ratios={"sync_vs_memcpy": seconds["memcpy"] / seconds["sync"]}, rows=[...])
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_rl.config import ConfigError, load_config
from megatron_rl.observability.benchmark_results import publish

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Arguments:
    """What the user asked for."""

    quick: bool
    """Finish in under a minute, with fewer repetitions or smaller sizes."""
    json: Path | None
    """Where to write the result, or None."""


def parse_arguments(description: str | None, argv: Sequence[str] | None = None) -> Arguments:
    """The two flags of every benchmark; `argv` defaults to the command line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="finish in under a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result to FILE")
    parsed = parser.parse_args(argv)
    return Arguments(quick=parsed.quick, json=parsed.json)


def parse_training_arguments(description: str | None, quick: str, work: str) -> argparse.Namespace:
    """The flags of a benchmark that compares whole runs: `quick`, `json`, `config`, `work` and `override`.

    Args:
        description: the benchmark's own.
        quick: what `--quick` leaves out.
        work: default of the folder for runs.

    Raises:
        ConfigError: when there is no model to begin with.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result to FILE")
    parser.add_argument("--config", default="configs/arithmetic.yaml", help="experiment (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=Path(work), help="emptied (default: %(default)s)")
    parser.add_argument("override", nargs="*", metavar="KEY=VALUE", help="changes of the experiment, for all runs")
    flags = parser.parse_args()
    base = Path(load_config(flags.config, flags.override).model.path)
    if not (base / "config.json").is_file():
        raise ConfigError(f"{base} holds no model; run `make demo` first, or name another experiment with --config.")
    return flags


def measure(
    cases: Mapping[str, Callable[[], Any]],
    repetitions: int,
    warmups: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median seconds of each case over interleaved repetitions (a, b, a, b, ...), after `warmups` unmeasured rounds."""
    samples: dict[str, list[float]] = {name: [] for name in cases}
    for repetition in range(-warmups, repetitions):
        for name, run in cases.items():
            start = clock()
            run()
            elapsed = clock() - start
            if repetition >= 0:
                samples[name].append(elapsed)
    return {name: statistics.median(values) for name, values in samples.items()}


def finish(
    arguments: Arguments,
    ratios: Mapping[str, float],
    rows: Sequence[Mapping[str, Any]],
    console: Console | None = None,
) -> None:
    """Print the rows and ratios as tables, and write the JSON when asked to; see `benchmark_results.publish`."""
    publish(Path(sys.argv[0]).stem, ratios, rows, arguments.json, arguments.quick, console)


def run_command(*arguments: str) -> None:
    """Run `megatron-rl` with these arguments; when it fails, which it explains itself, this process ends alike."""
    if status := subprocess.run([str(Path(sys.executable).with_name("megatron-rl")), *arguments]).returncode:
        raise SystemExit(status)
