"""What a rank did during one step, as spans of time: shows the bubbles and what filled them.

Spans are recorded where waits are filled, at a few microseconds each, and only while `recording`. The ranks' spans are
merged by the wall clock, which nodes share as precisely as NTP synchronises it.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path

KINDS = (
    "forward",
    "backward",
    "forward + backward",
    "communication",
    "bubble, filled",
    "bubble, empty",
    "tail, filled",
    "tail, empty",
)
TRACE_FILE = "timeline.json"
"""File of the newest filled step, in the folder of a run."""


@dataclass(frozen=True)
class Span:
    """One stretch of a rank's time."""

    kind: str
    """One of KINDS."""
    start: float
    """Seconds."""
    end: float


class Timeline:
    """The spans of this rank."""

    def __init__(self) -> None:
        self.recording = False
        self.spans: list[Span] = []

    def start(self) -> None:
        """Discard earlier spans and record from now on."""
        self.spans, self.recording = [], True

    def add(self, kind: str, start: float, end: float) -> None:
        """Record a span between two times of `time.perf_counter`; empty ones are dropped."""
        if self.recording and end > start:
            self.spans.append(Span(kind, start, end))

    def add_wait(
        self, start: float, agreed: float, end: float, slices: list[tuple[float, float]], idle: str = "bubble"
    ) -> None:
        """Record a wait: slices in it, empty time, and the transfer that follows `agreed`.

        Args:
            start: when the wait began.
            agreed: when both sides were ready; `end` where nothing is transferred.
            end: when the tensors had arrived too.
            slices: (start, end) of each slice, in order; the last may have ended after `end`.
            idle: bubble | tail.
        """
        if not self.recording:
            return
        last = start
        for first, over in [*slices, (max(end, last), end)]:
            self.add(f"{idle}, empty", last, min(first, agreed))
            self.add("communication", max(last, agreed), first)
            self.add(f"{idle}, filled", first, over)
            last = over

    def stop(self) -> list[Span]:
        """End the recording; returns its spans on the wall clock (seconds since the epoch)."""
        self.recording = False
        offset = time.time() - time.perf_counter()
        return [Span(span.kind, span.start + offset, span.end + offset) for span in self.spans]


def rows(ranks: list[list[Span]]) -> dict[str, list[tuple[int, float, float]]]:
    """For a plot: by kind, in the order of KINDS, (rank, seconds since the first span began, length in seconds)."""
    origin = _origin(ranks)
    by_kind: dict[str, list[tuple[int, float, float]]] = {kind: [] for kind in KINDS}
    for rank, spans in enumerate(ranks):
        for span in spans:
            by_kind[span.kind].append((rank, span.start - origin, span.end - span.start))
    return {kind: values for kind, values in by_kind.items() if values}


def write_trace(ranks: list[list[Span]], file: Path, step: int) -> None:
    """Write the spans as Chrome trace events (for chrome://tracing or Perfetto): one process per rank."""
    origin = _origin(ranks)
    events: list[dict[str, object]] = []
    for rank, spans in enumerate(ranks):
        events.append({"name": "process_name", "ph": "M", "pid": rank, "args": {"name": f"rank {rank}"}})
        for span in spans:
            micros = {"ts": (span.start - origin) * 1e6, "dur": (span.end - span.start) * 1e6}
            events.append({"name": span.kind, "ph": "X", "pid": rank, "tid": 0, **micros})
    draft = file.with_suffix(".tmp")
    draft.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"step": step}}))
    draft.replace(file)


def read_trace(file: Path) -> tuple[list[list[Span]], int]:
    """Read what `write_trace` wrote: (spans of each rank from zero, step).

    Raises:
        ValueError: the file is something else.
    """
    try:
        trace = json.loads(file.read_text())
        events = trace["traceEvents"]
        ranks: list[list[Span]] = [[] for event in events if event["ph"] == "M"]
        for event in events:
            if event["ph"] == "X":
                start = event["ts"] / 1e6
                kind = KINDS[KINDS.index(event["name"])]
                ranks[event["pid"]].append(Span(kind, start, start + event["dur"] / 1e6))
        return ranks, int(trace["otherData"]["step"])
    except (ValueError, LookupError, TypeError):
        raise ValueError(f"{file} is not the timeline of a step as a run writes it; delete or rename it.") from None


def _origin(ranks: list[list[Span]]) -> float:
    return min((span.start for spans in ranks for span in spans), default=0.0)
