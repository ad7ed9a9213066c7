"""The plots of a report. Each function draws one PNG and returns False when the run lacks the metrics for it."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter

Records = list[dict[str, float]]

BLUE, ORANGE, GREEN, RED, GREY = "#2f6db5", "#e08a1e", "#3a9a5b", "#c8423f", "#8a8f98"
ARM_COLOURS = (GREY, "#9cc3e6", "#5b9bd5", BLUE, "#173f73", ORANGE, GREEN, RED)
TOKEN_SOURCES = ("reused", "drafted", "generated")
PHASES = (  # metric, name, colour; in the order of a step
    ("time/generate", "generate", "#2f6db5"),
    ("time/sleep", "falling asleep", "#b0b0b0"),
    ("time/reward", "reward", "#7fb2e5"),
    ("time/old_logprobs", "old log-probs", "#3a9a5b"),
    ("time/ref_logprobs", "reference log-probs", "#9fd3ae"),
    ("time/values", "values", "#5fb3b3"),
    ("time/critic_update", "critic update", "#2c7a7a"),
    ("time/update", "update", "#e08a1e"),
    ("time/weight_sync", "weight sync", "#c8423f"),
    ("time/drafter", "drafter", "#d9b44a"),
    ("time/eval", "evaluation", "#8e6bbf"),
    ("time/checkpoint", "checkpoint", "#6b4f3a"),
)
OUTSIDE_THE_STEP = ("evaluation", "checkpoint")  # `time/step` does not include them
OTHER = ("other", "#c3c7cd")
SPAN_COLOURS = {
    "forward": BLUE,
    "backward": "#173f73",
    "forward + backward": "#5b9bd5",
    "communication": RED,
    "bubble, filled": GREEN,
    "bubble, empty": "#dcdfe4",
    "tail, filled": ORANGE,
    "tail, empty": "#f6dfbd",
}
STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555b63",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e6ea",
    "legend.frameon": False,
    "figure.facecolor": "white",
}


def reward(records: Records, file: Path) -> bool:
    """Mean reward per step, with its spread of one standard deviation over the responses."""
    steps, mean = series(records, "reward/mean")
    if not steps:
        return False
    with _figure(file, "training step", "reward") as axes:
        spread_steps, spread = series(records, "reward/std")
        if spread_steps == steps:
            low = [value - width for value, width in zip(mean, spread, strict=True)]
            high = [value + width for value, width in zip(mean, spread, strict=True)]
            axes.fill_between(steps, low, high, color=BLUE, alpha=0.15, linewidth=0, label="± 1 standard deviation")
        axes.plot(steps, mean, color=BLUE, linewidth=1.8, marker=_marker(steps), label="mean")
        axes.legend(loc="best")
    return True


def accuracy(records: Records, file: Path) -> bool:
    """Accuracy on every held-out set over the steps; step 0 is the model before training."""
    names = accuracy_names(records)
    if not names:
        return False
    with _figure(file, "training step", "held-out accuracy") as axes:
        for name, color in zip(names, _cycle(), strict=False):
            steps, values = series(records, name)
            label = name.removeprefix("eval/").replace("/greedy_accuracy", ", greedy").replace("/avg_at_k", ", avg@k")
            axes.plot(steps, values, color=color, linewidth=1.8, marker="o", label=label)
        axes.set_ylim(0, 1.02)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.legend(loc="best")
    return True


def length(records: Records, file: Path) -> bool:
    """Distribution of response lengths per step: median, middle half and middle nine tenths."""
    present = {name: series(records, f"response/length_{name}") for name in ("p5", "p25", "p50", "p75", "p95", "mean")}
    steps, median = present["p50"]
    if not steps:
        steps, mean = present["mean"]
        if not steps:
            return False
        with _figure(file, "training step", "response length [tokens]") as axes:
            axes.plot(steps, mean, color=BLUE, linewidth=1.8, marker=_marker(steps), label="mean")
            axes.legend(loc="best")
        return True
    with _figure(file, "training step", "response length [tokens]") as axes:
        for low, high, alpha, label in (("p5", "p95", 0.15, "5 to 95 %"), ("p25", "p75", 0.3, "25 to 75 %")):
            if present[low][0] == steps and present[high][0] == steps:
                axes.fill_between(
                    steps, present[low][1], present[high][1], color=BLUE, alpha=alpha, linewidth=0, label=label
                )
        axes.plot(steps, median, color=BLUE, linewidth=1.8, marker=_marker(steps), label="median")
        axes.set_ylim(bottom=0)
        axes.legend(loc="best")
    return True


def logprob_gap(records: Records, file: Path) -> bool:
    """Absolute difference between trainer and engine log-probabilities of the sampled tokens, logarithmic."""
    drawn = [("logprob_gap/max", "largest", ORANGE), ("logprob_gap/mean", "mean", BLUE)]
    points = [(series(records, name), label, color) for name, label, color in drawn]
    if not any(value > 0 for (_, values), _, _ in points for value in values):
        return False  # a logarithmic axis has no place for zero
    with _figure(file, "training step", "log-prob difference [nats]") as axes:
        for (steps, values), label, color in points:
            axes.plot(steps, values, color=color, linewidth=1.8, marker=_marker(steps), label=label)
        axes.set_yscale("log")
        axes.legend(loc="best")
    return True


def time_per_phase(records: Records, file: Path) -> bool:
    """Seconds per phase, stacked, one bar a step."""
    trained = [record for record in records if record["step"] > 0]
    phases = phase_seconds(trained)
    if not phases:
        return False
    colors = {name: color for _, name, color in PHASES} | dict([OTHER])
    steps = [record["step"] for record in trained]
    with _figure(file, "training step", "time [s]") as axes:
        bottom = [0.0] * len(steps)
        for name, seconds in phases.items():
            axes.bar(steps, seconds, bottom=bottom, width=0.9, color=colors[name], label=name)
            bottom = [low + high for low, high in zip(bottom, seconds, strict=True)]
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), reverse=True)
    return True


def speculation(records: Records, file: Path) -> bool:
    """Tokens per verification and the share of tokens that came from drafts, per step."""
    steps, accepted = series(records, "speculation/tokens_per_verification")
    share_steps, share = series(records, "speculation/draft_token_fraction")
    if not steps or not share_steps:
        return False
    with _figure(file, "training step", "tokens per verification") as axes:
        axes.plot(steps, accepted, color=BLUE, linewidth=1.8, marker=_marker(steps), label="tokens per verification")
        axes.set_ylim(bottom=1)
        other = axes.twinx()
        other.plot(share_steps, share, color=ORANGE, linewidth=1.4, label="share of tokens from drafts")
        other.set_ylim(0, 1)
        other.yaxis.set_major_formatter(PercentFormatter(1.0))
        other.grid(visible=False)
        lines = [*axes.get_lines(), *other.get_lines()]
        axes.legend(lines, [str(line.get_label()) for line in lines], loc="best")
    return True


def history(records: Records, file: Path) -> bool:
    """Response tokens per step by where they came from."""
    found = {name: series(records, f"history/{name}_tokens") for name in TOKEN_SOURCES}
    steps = found["reused"][0]
    if not steps:
        return False
    with _figure(file, "training step", "tokens") as axes:
        amounts = [found[name][1] for name in TOKEN_SOURCES]
        axes.stackplot(steps, *amounts, labels=TOKEN_SOURCES, colors=(BLUE, "#9cc3e6", ORANGE))
        axes.set_ylim(bottom=0)
        axes.legend(loc="best")
    return True


def drafter(records: Records, file: Path) -> bool:
    """Tokens per verification of the head: expected on held-out rollouts, in training, and as the engines had it."""
    steps, heldout = series(records, "drafter/heldout_length")
    if not steps:
        return False
    with _figure(file, "training step", "tokens per verification") as axes:
        for name, label, color, width in (
            ("trained_length", "trained head, held out", "#9cc3e6", 1.4),
            ("heldout_length", "engines' head, held out", BLUE, 1.8),
            ("live_length", "engines, live", ORANGE, 1.4),
        ):
            at, values = series(records, f"drafter/{name}")
            if at:
                axes.plot(at, values, color=color, linewidth=width, marker=_marker(at), markersize=4, label=label)
        published = set(publications(records))
        marks = [(step, value) for step, value in zip(steps, heldout, strict=True) if step in published]
        if marks:
            marked, lengths = zip(*marks, strict=True)
            axes.scatter(marked, lengths, s=40, marker="^", color=BLUE, zorder=3, label="published")
        axes.set_ylim(bottom=1)
        axes.legend(loc="best")
    return True


def idle_time(records: Records, file: Path) -> bool:
    """Idle seconds per step, stacked: of bubbles and of tails, what was filled and what stayed empty."""
    idle = idle_seconds(records)
    if not idle:
        return False
    steps = [record["step"] for record in records if record["step"] > 0]
    with _figure(file, "training step", "idle time [s]") as axes:
        bars = {f"{name}, filled": filled for name, (_, filled) in idle.items()}
        for name, (available, filled) in idle.items():
            bars[f"{name}, empty"] = [max(whole - part, 0.0) for whole, part in zip(available, filled, strict=True)]
        bottom = [0.0] * len(steps)
        for kind, seconds in bars.items():
            axes.bar(steps, seconds, bottom=bottom, width=0.9, color=SPAN_COLOURS[kind], label=kind)
            bottom = [low + high for low, high in zip(bottom, seconds, strict=True)]
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), reverse=True)
    return True


def speculation_timeline(steps: list[tuple[float, int, str, int]], file: Path) -> None:
    """Live requests over time, coloured by the chosen arm; `steps` are (start in s, live requests, arm, emitted)."""
    with _figure(file, "seconds", "live requests") as axes:
        start = steps[0][0]
        # The step after the last prompt step is the first one that means anything on the time axis.
        for place, arm in enumerate(sorted({arm for _, _, arm, _ in steps}, key=_arm_order)):
            chosen = [(begin - start, batch) for begin, batch, name, _ in steps if name == arm]
            times, batches = zip(*chosen, strict=True)
            axes.scatter(times, batches, s=7, color=ARM_COLOURS[place % len(ARM_COLOURS)], label=arm, linewidths=0)
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.legend(loc="best", title="choice", markerscale=2.5)


def acceptance_over_steps(steps: list[int], lengths: dict[str, list[float]], file: Path) -> None:
    """Tokens per verification over training steps, a line per drafter."""
    with _figure(file, "training step", "tokens per verification") as axes:
        for (name, values), color in zip(lengths.items(), _cycle(), strict=False):
            axes.plot(steps, values, color=color, linewidth=1.8, marker="o", label=name)
        axes.set_ylim(bottom=1)
        axes.legend(loc="best")


def step_timeline(kinds: dict[str, list[tuple[int, float, float]]], file: Path) -> None:
    """One step, a bar per trainer process: the tail of its generation and its passes, side by side.

    Args:
        kinds: by kind of span, (rank, start in s, length in s), see `drafter.idle_time.timeline.rows`.
        file: to write.
    """
    tails = {kind: spans for kind, spans in kinds.items() if kind.startswith("tail")}
    passes = {kind: spans for kind, spans in kinds.items() if kind not in tails}
    panels = [
        (x, spans) for x, spans in (("tail of the generation", tails), ("old log-probs and update", passes)) if spans
    ]
    ranks = sorted({rank for spans in kinds.values() for rank, _, _ in spans})
    with pyplot.rc_context(STYLE):
        size = (9.6, min(1.8 + 0.45 * len(ranks), 12.0))
        shares = [2 if spans is passes else 1 for _, spans in panels]
        figure, axes = pyplot.subplots(
            1, len(panels), figsize=size, sharey=True, squeeze=False, width_ratios=shares, layout="constrained"
        )
        for (x, spans), place in zip(panels, axes[0], strict=True):
            _draw_spans(place, spans, x)
        axes[0][0].set_ylabel("rank")
        axes[0][0].yaxis.set_major_locator(MaxNLocator(integer=True))
        axes[0][0].set_ylim(ranks[-1] + 0.5, ranks[0] - 0.5)
        figure.legend(loc="outside right upper")
        figure.savefig(file, dpi=130)
        pyplot.close(figure)


def _draw_spans(axes: Axes, kinds: dict[str, list[tuple[int, float, float]]], x: str) -> None:
    """Bars of the spans of each rank, on a time axis that begins with the first of them."""
    origin = min(start for spans in kinds.values() for _, start, _ in spans)
    end = max(start + length for spans in kinds.values() for _, start, length in spans)
    unit, scale = ("s", 1.0) if end - origin > 2 else ("ms", 1e3)
    for kind, spans in kinds.items():
        color, label = SPAN_COLOURS[kind], kind
        for rank in sorted({rank for rank, _, _ in spans}):
            bars = [(scale * (start - origin), scale * length) for place, start, length in spans if place == rank]
            axes.broken_barh(bars, (rank - 0.4, 0.8), color=color, label=label, linewidth=0)
            label = "_"  # one entry of the legend is enough
    axes.set_xlabel(f"{x} [{unit}]")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    axes.grid(visible=False, axis="y")


def _arm_order(arm: str) -> tuple[str, int]:
    name, _, k = arm.partition(":")
    return ("", 0) if not k else (name, int(k))


def accuracy_names(records: Records) -> list[str]:
    """Names of the accuracies that have a value, greedy ones first."""
    names = {name for record in records for name, value in record.items() if math.isfinite(value)}
    kinds = ("/greedy_accuracy", "/avg_at_k")
    return [name for kind in kinds for name in sorted(names) if name.startswith("eval/") and name.endswith(kind)]


def phase_seconds(records: Records) -> dict[str, list[float]]:
    """Seconds of every phase that the run has, per step; `other` is what `time/step` has beyond its phases."""
    phases = {}
    for metric, name, _ in PHASES:
        seconds = [_finite(record.get(metric)) for record in records]
        if any(seconds):
            phases[name] = seconds
    inside = [seconds for name, seconds in phases.items() if name not in OUTSIDE_THE_STEP]
    named = [sum(values) for values in zip(*inside, strict=True)] or [0.0] * len(records)
    other = [max(_finite(record.get("time/step")) - known, 0.0) for record, known in zip(records, named, strict=True)]
    if any(other):
        phases[OTHER[0]] = other
    return phases


def publications(records: Records) -> list[float]:
    """Steps after which the engines had a new version of the head."""
    steps, versions = series(records, "drafter/version")
    return [step for step, before, after in zip(steps, [0.0, *versions], versions, strict=False) if after > before]


def idle_seconds(records: Records) -> dict[str, tuple[list[float], list[float]]]:
    """Per kind of idle time that the training steps had, seconds (available, filled) per step."""
    trained = [record for record in records if record["step"] > 0]
    idle = {}
    for name in ("bubble", "tail"):
        available = [_finite(record.get(f"drafter/{name}_available_s")) for record in trained]
        if any(available):
            idle[name] = available, [_finite(record.get(f"drafter/{name}_filled_s")) for record in trained]
    return idle


def series(records: Records, name: str) -> tuple[list[float], list[float]]:
    """Steps that have a finite value of a metric, and the values."""
    points = [(record["step"], record[name]) for record in records if math.isfinite(record.get(name, math.nan))]
    return [step for step, _ in points], [value for _, value in points]


def _finite(value: float | None) -> float:
    return value if value is not None and math.isfinite(value) else 0.0


def _marker(steps: list[float]) -> str | None:
    """Points are drawn for short runs only; a single point would be invisible as a line."""
    return "o" if len(steps) <= 12 else None


def _cycle() -> Iterator[str]:
    while True:
        yield from (BLUE, ORANGE, GREEN, RED, GREY)


@contextmanager
def _figure(file: Path, x: str, y: str) -> Iterator[Axes]:
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(figsize=(7.2, 3.6), layout="constrained")
        try:
            yield axes
            axes.set_xlabel(x)
            axes.set_ylabel(y)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
            figure.savefig(file, dpi=130)
        finally:
            pyplot.close(figure)
