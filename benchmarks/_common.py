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
from pathlib import Path
from typing import Any

from megatron_rl.config import ConfigError, load_config
from megatron_rl.observability.benchmark_results import publish
from megatron_rl.observability.console import Console
from megatron_rl.observability.terminal import Terminal

ROOT = Path(__file__).resolve().parents[1]


def benchmark_parser(description: str | None, quick: str = "finish in under a minute") -> argparse.ArgumentParser:
    """A parser with the two flags of every benchmark, to which one may add flags of its own.

    Args:
        description: the benchmark's own.
        quick: what `--quick` does.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result to FILE")
    return parser


def parse_arguments(description: str | None, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The two flags of every benchmark, `quick` and `json`; `argv` defaults to the command line."""
    return benchmark_parser(description).parse_args(argv)


def training_parser(description: str | None, quick: str, work: str) -> argparse.ArgumentParser:
    """A parser for a benchmark that compares whole runs: `quick`, `json`, `config`, `work` and `override`.

    Args:
        description: the benchmark's own.
        quick: what `--quick` leaves out.
        work: default of the folder for runs.
    """
    parser = benchmark_parser(description, quick)
    parser.add_argument("--config", default="configs/arithmetic.yaml", help="experiment (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=Path(work), help="emptied (default: %(default)s)")
    parser.add_argument("override", nargs="*", metavar="KEY=VALUE", help="changes of the experiment, for all runs")
    return parser


def parse_training_arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """What the command line says to a parser made by `training_parser`.

    Raises:
        ConfigError: when there is no model to begin with.
    """
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
    """Time all cases in interleaved repetitions (a, b, a, b, ...).

    Args:
        cases: what to run, by name.
        repetitions: measured rounds.
        warmups: rounds before them that are not measured.
        clock: gives seconds.

    Returns:
        The median seconds of each case.
    """
    samples: dict[str, list[float]] = {name: [] for name in cases}
    with Console(enabled=True).phase("measuring", (warmups + repetitions) * len(cases), ticking=False) as phase:
        for repetition in range(-warmups, repetitions):
            for name, case in cases.items():
                start = clock()
                case()
                elapsed = clock() - start
                if repetition >= 0:
                    samples[name].append(elapsed)
                phase.advance(note=name)
    return {name: statistics.median(values) for name, values in samples.items()}


def finish(
    arguments: argparse.Namespace,
    ratios: Mapping[str, float],
    rows: Sequence[Mapping[str, Any]],
    terminal: Terminal | None = None,
) -> None:
    """Print the rows and ratios as tables, and write the JSON when asked to; see `benchmark_results.publish`."""
    publish(Path(sys.argv[0]).stem, ratios, rows, arguments.json, arguments.quick, terminal)


def run_benchmark(main: Callable[[], None]) -> None:
    """Run a benchmark's `main`: a user's mistake is one line on stderr."""
    try:
        main()
    except ConfigError as error:
        raise SystemExit(str(error)) from None


def run_command(*arguments: str) -> None:
    """Run `megatron-rl` with these arguments; when it fails, which it explains itself, this process ends alike."""
    if status := subprocess.run([str(Path(sys.executable).with_name("megatron-rl")), *arguments]).returncode:
        raise SystemExit(status)
