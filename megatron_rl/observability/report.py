"""`report.md` with plots for a run, from its `metrics.jsonl`, `timeline.json` and `config.yaml`."""

import math
from collections.abc import Sequence
from pathlib import Path

import yaml
from rich.table import Table
from rich.text import Text

from drafter.idle_time.timeline import TRACE_FILE, read_trace, rows
from megatron_rl.config import ConfigError
from megatron_rl.observability import plots
from megatron_rl.observability.metrics_logger import read_metrics
from megatron_rl.observability.terminal import Terminal, standard_output

Records = list[dict[str, float]]

SETTINGS = (
    "model.path",
    "model.precision",
    "parallel.tp_size",
    "parallel.pp_size",
    "data.train",
    "algorithm.name",
    "algorithm.group_size",
    "train.steps",
    "train.prompts_per_step",
    "train.tokens_per_microbatch",
    "train.lr",
    "train.seed",
    "rollout.engines",
    "rollout.max_tokens",
    "rollout.temperature",
    "rollout.sampler",
    "rollout.quantization",
    "rollout.precision_tail",
    "rollout.history.mode",
    "rollout.speculation.adaptive",
    "rollout.speculation.max_draft_tokens",
    "reward.function",
    "reward.name",
)
PLOTS = (
    ("reward", "Reward", plots.reward),
    ("accuracy", "Held-out accuracy", plots.accuracy),
    ("length", "Response length", plots.length),
    ("logprob_gap", "Log-probability gap between trainer and engine", plots.logprob_gap),
    ("time", "Time per phase", plots.time_per_phase),
    ("speculation", "Speculative decoding", plots.speculation),
    ("history", "Reuse of earlier responses", plots.history),
    ("drafter", "Trained drafter", plots.drafter),
    ("idle", "Idle time for the drafter", plots.idle_time),
)


def write_report(run_dir: Path) -> Path:
    """Write `report.md` and its PNG plots into `run_dir`; a plot whose metrics are missing is left out and named.

    Raises:
        ConfigError: when the folder has no metrics, or a timeline that cannot be read.
    """
    records = read_metrics(run_dir)
    sections = [f"# {run_dir.name}", _summary(records)]
    missing = []
    for name, title, draw in PLOTS:
        file = run_dir / f"report-{name}.png"
        if draw(records, file):
            sections.append(f"## {title}\n\n![{title}]({file.name})")
        else:
            file.unlink(missing_ok=True)  # of an earlier report
            missing.append(title.lower())
    if missing:
        sections.append(f"Not shown, because the run has no such metrics: {', '.join(missing)}.")
    if timeline := _timeline(run_dir):
        sections.append(timeline)
    sections.append(_settings(run_dir / "config.yaml"))
    file = run_dir / "report.md"
    draft = file.with_suffix(".tmp")
    draft.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    draft.replace(file)
    return file


def print_summary(run_dir: Path, terminal: Terminal | None = None) -> None:
    """Print accuracy before and after and the time per phase of a run.

    Raises:
        ConfigError: when the folder has no metrics.
    """
    records = read_metrics(run_dir)
    terminal = terminal or standard_output()
    accuracy, times = accuracy_rows(records), time_rows(records)
    if accuracy:
        terminal.print(_rich_table("Accuracy", ("held-out", "before", "after", "change"), accuracy))
    else:
        terminal.print("no evaluation in this run", highlight=False)
    if times:
        terminal.print(_rich_table("Time", ("phase", "total", "per step", "share"), times))
    for line in (speculation_line(records), history_line(records), drafter_line(records)):
        if line:
            terminal.print(line, highlight=False)


def _rich_table(title: str, header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> Table:
    """A name and numbers in each row."""
    table = Table(header[0], title=title)
    for name in header[1:]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def speculation_line(records: Records) -> str:
    """What drafts gave over the run, in one sentence; empty without speculation."""
    _, share = plots.series(records, "speculation/draft_token_fraction")
    _, accepted = plots.series(records, "speculation/tokens_per_verification")
    if not share or not accepted:
        return ""
    return (
        f"Speculation: {sum(share) / len(share):.0%} of the generated tokens came from drafts, "
        f"{sum(accepted) / len(accepted):.2f} tokens per verification."
    )


def history_line(records: Records) -> str:
    """What the reuse of earlier responses gave over the run, in one sentence; empty without it."""
    totals = {name: sum(plots.series(records, f"history/{name}_tokens")[1]) for name in plots.TOKEN_SOURCES}
    if not sum(totals.values()):
        return ""
    _, saved = plots.series(records, "saved/reuse_s")
    return (
        f"History: {totals['reused'] / sum(totals.values()):.0%} of the tokens were reused, "
        f"about {sum(saved):.1f} s of generation saved."
    )


def drafter_line(records: Records) -> str:
    """How the trained head did over the run, in one sentence; empty without one."""
    _, heldout = plots.series(records, "drafter/heldout_length")
    _, versions = plots.series(records, "drafter/version")
    if not versions:
        return ""
    parts = [f"{versions[-1]:.0f} version{'s' if versions[-1] != 1 else ''} published"]
    if heldout:
        parts.append(f"tokens per verification on held-out rollouts {heldout[0]:.2f} -> {heldout[-1]:.2f}")
    if live := _live_length(records):
        parts.append(f"{live:.2f} in the engines")
    idle = plots.idle_seconds(records).values()
    if available := sum(sum(seconds) for seconds, _ in idle):
        filled = sum(sum(seconds) for _, seconds in idle)
        parts.append(f"{filled / available:.0%} of {available:.1f} idle seconds filled")
    _, cost = plots.series(records, "drafter/fill_cost")
    if cost:
        parts.append(f"steps {abs(cost[-1]):.1%} {'slower' if cost[-1] >= 0 else 'faster'} for it")
    return f"Trained drafter: {', '.join(parts)}."


def _live_length(records: Records) -> float | None:
    """Tokens per verification over all drafts that the engines verified; None without any."""
    steps = [
        (record.get("drafter/live_drafts", 0.0), record.get("drafter/live_length", math.nan)) for record in records
    ]
    drafts = sum(count for count, _ in steps if count)
    return sum(count * length for count, length in steps if count) / drafts if drafts else None


def accuracy_rows(records: Records) -> list[tuple[str, str, str, str]]:
    """(set and kind, first value, last value, change in points) of every accuracy that was measured."""
    rows = []
    for name in plots.accuracy_names(records):
        values = [record[name] for record in records if math.isfinite(record.get(name, math.nan))]
        label = name.removeprefix("eval/").replace("/greedy_accuracy", ", greedy").replace("/avg_at_k", ", avg@k")
        change = f"{100 * (values[-1] - values[0]):+.1f} points" if len(values) > 1 else "measured once"
        rows.append((label, f"{values[0]:.1%}", f"{values[-1]:.1%}", change))
    return rows


def time_rows(records: Records) -> list[tuple[str, str, str, str]]:
    """(phase, seconds in total, seconds per step, share of all) over the training steps of the run."""
    steps = [record for record in records if record["step"] > 0]
    phases = plots.phase_seconds(steps)
    total = sum(sum(seconds) for seconds in phases.values())
    if not total:
        return []
    rows = [(name, sum(seconds)) for name, seconds in phases.items()] + [("all", total)]
    return [
        (name, f"{seconds:.1f} s", f"{seconds / len(steps):.2f} s", f"{seconds / total:.0%}") for name, seconds in rows
    ]


def _summary(records: Records) -> str:
    steps = [record for record in records if record["step"] > 0]
    lines = [f"{len(steps)} training steps."]
    accuracy = accuracy_rows(records)
    if accuracy:
        lines.append(_table(("held-out accuracy", "before", "after", "change"), accuracy))
    times = time_rows(records)
    if times:
        lines.append(_table(("phase", "total", "per step", "share"), times))
    lines += [speculation_line(records), history_line(records), drafter_line(records)]
    return "\n\n".join(line for line in lines if line)


def _timeline(run_dir: Path) -> str:
    """The section with the picture of `timeline.json`; empty for a run without it."""
    trace, picture = run_dir / TRACE_FILE, run_dir / "report-timeline.png"
    if not trace.exists():
        picture.unlink(missing_ok=True)  # of an earlier report
        return ""
    try:
        ranks, step = read_trace(trace)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    plots.step_timeline(rows(ranks), picture)
    return (
        f"## Timeline of step {step}\n\n![Timeline of step {step}]({picture.name})\n\n"
        f"The newest step with filled idle time, per trainer process. [{trace.name}]({trace.name}) opens in "
        "chrome://tracing or Perfetto."
    )


def _settings(file: Path) -> str:
    if not file.exists():
        return f"Settings are not shown, because there is no {file.name}."
    config = yaml.safe_load(file.read_text(encoding="utf-8"))
    rows = []
    for key in SETTINGS:
        value = config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is not None:
            rows.append((f"`{key}`", str(value)))
    return f"## Settings\n\nAll of them are in [{file.name}]({file.name}).\n\n" + _table(("key", "value"), rows)


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [header, ("---",) + ("---:",) * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
