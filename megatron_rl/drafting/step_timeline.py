"""The timeline of a run: what every trainer process did in the newest step whose idle time was filled."""

from collections.abc import Sequence
from pathlib import Path

import torch

from drafter.idle_time.timeline import TRACE_FILE, Span, Timeline, write_trace


class StepTimeline:
    """Keeps this rank's spans of one step, from the tail of its generation to the end of its update."""

    def __init__(self, timelines: Sequence[Timeline], group: torch.distributed.ProcessGroup) -> None:
        """Keep no spans yet.

        Args:
            timelines: of those who fill idle time here; none where nobody does, on all ranks alike.
            group: of all trainer processes, for host objects.
        """
        self._timelines, self._group = timelines, group
        self._spans: list[Span] = []
        self._step = 0

    def begin(self) -> None:
        """A step begins whose idle time is to be filled."""
        for timeline in self._timelines:
            timeline.start()

    def end(self, step: int) -> None:
        """The step is over; if `begin` announced it, its spans take the place of an earlier step's."""
        if any(timeline.recording for timeline in self._timelines):
            self._spans = [span for timeline in self._timelines for span in timeline.stop()]
            self._step = step

    def write(self, run_dir: Path) -> None:
        """Write the step to `timeline.json`, if there is one. A collective operation."""
        if not self._timelines:
            return
        ranks = gather(self._spans, self._group)
        if any(ranks):
            write_trace(ranks, run_dir / TRACE_FILE, self._step)


def gather(spans: list[Span], group: torch.distributed.ProcessGroup) -> list[list[Span]]:
    """The spans of all ranks of `group` (one that moves host objects), by rank, on its first rank; elsewhere []."""
    gathered: list[list[Span]] | None = [[]] * group.size() if group.rank() == 0 else None
    torch.distributed.gather_object(spans, gathered, group=group, group_dst=0)
    return gathered or []
