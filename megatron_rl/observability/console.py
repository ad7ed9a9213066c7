"""What a run shows: one passing progress line per phase, and one row per step that stays."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from megatron_rl.observability.terminal import Terminal, standard_output
from rollout.types import Rollout

HEADER_EVERY_ROWS = 20
FIRST_PLAIN_LINE_S = 10.0
"""Seconds after which a phase says in a log file that it is alive."""
PLAIN_LINE_EVERY_S = 30.0
"""Seconds from then on to the next such line."""

COLUMNS = (
    ("reward", "reward/mean", 7, ".3f"),
    ("greedy", None, 7, ".1%"),
    ("length", "response/length_mean", 7, ".1f"),
    ("lp gap", "logprob_gap/mean", 8, ".1e"),
    ("grad", "optim/grad_norm", 8, ".3g"),
    ("step s", "time/step", 8, ".2f"),
    ("gen s", "time/generate", 8, ".2f"),
    ("old s", "time/old_logprobs", 8, ".2f"),
    ("upd s", "time/update", 8, ".2f"),
    ("sync s", "time/weight_sync", 8, ".2f"),
)
"""Of the row of a step: heading, metric, width in characters, format of the value."""
LEAST_SAVING = 0.05
"""Seconds that an acceleration must save in a step to be named in its row."""
COUNTS_WORTH_A_NOTE = {
    "reward/errors": "reward errors",
    "reward/timeouts": "reward timeouts",
    "correction/skipped_updates": "updates skipped: algorithm.correction rejected all tokens, widen its bounds",
    "optim/skipped_updates": "updates skipped: loss or gradient not finite",
    "sampling/filled_prompts": "prompts teach nothing: algorithm.dynamic_sampling found no others",
}


class Phase:
    """Progress of one phase of a step; use it as a context manager."""

    def __init__(
        self,
        terminal: Terminal | None,
        name: str,
        total: int,
        on_progress: Callable[[str], None],
        ticking: bool = True,
    ) -> None:
        """See `Console.phase`."""
        self._terminal, self._name, self._total = terminal, name, total
        self._on_progress, self._ticking = on_progress, ticking
        self._done = 0
        self._progress: Progress | None = None
        self._next_line = time.monotonic() + FIRST_PLAIN_LINE_S

    def __enter__(self) -> "Phase":
        if self._terminal is not None and self._terminal.is_interactive:
            columns = (TextColumn("{task.description:>12}", markup=False), BarColumn(24), MofNCompleteColumn())
            self._progress = Progress(
                *columns,
                TextColumn("{task.fields[note]}", markup=False),
                TimeElapsedColumn(),
                console=self._terminal,
                transient=True,
                refresh_per_second=4,
                auto_refresh=self._ticking,
            )
            self._progress.start()
            self._task = self._progress.add_task(self._name, total=self._total, note="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def grow(self, count: int) -> None:
        """The phase has `count` more items."""
        self._total += count
        if self._progress is not None:
            self._progress.update(self._task, total=self._total)

    def advance(self, count: int = 1, note: str = "") -> None:
        """`count` more of the phase's items are done; `note` is shown beside them, e.g. a speed."""
        self._done += count
        self._on_progress(f"{self._name} {self._done}/{self._total}")
        if self._progress is not None:
            self._progress.update(self._task, advance=count, note=note, refresh=not self._ticking)
        elif self._terminal is not None and time.monotonic() >= self._next_line:
            # Not a terminal: a log file. Say something now and then, so that a long phase does not look dead.
            self._next_line = time.monotonic() + PLAIN_LINE_EVERY_S
            text = f"{self._name} {self._done}/{self._total}"
            self._terminal.print(f"{text}, {note}" if note else text, highlight=False, markup=False, soft_wrap=True)


class Console:
    """The output of one trainer process; all but the driver's are silent (`enabled=False`)."""

    def __init__(
        self,
        enabled: bool,
        terminal: Terminal | None = None,
        on_progress: Callable[[str], None] = lambda text: None,
    ) -> None:
        """`terminal` is where to print, standard output when left out; `on_progress` hears of it, printed or not."""
        self._on_progress = on_progress
        self._terminal = (terminal or standard_output()) if enabled else None
        self._rows = 0

    def phase(self, name: str, total: int, ticking: bool = True) -> Phase:
        """A progress line for a phase of `total` items: `with console.phase("generating", 256) as phase: ...`.

        Args:
            name: what is being done, e.g. `generating`.
            total: items of the phase.
            ticking: let the time shown go on between items, for which a thread wakes up four times a second; False
                where it would disturb what is being measured.
        """
        self._on_progress(f"{name} 0/{total}")
        return Phase(self._terminal, name, total, self._on_progress, ticking)

    @contextlib.contextmanager
    def progress(self, name: str) -> Iterator[Callable[[int, int], None]]:
        """A phase for work that says itself how far it is, by calling the function given: (items done, items in all).

        The phase begins with the first call. Work in several parts counts from 1 in each, and the parts add up.
        """
        with contextlib.ExitStack() as stack:
            phase: Phase | None = None

            def report(done: int, total: int) -> None:
                nonlocal phase
                if phase is None:
                    phase = stack.enter_context(self.phase(name, total))
                elif done == 1:
                    phase.grow(total)
                phase.advance()

            yield report

    def info(self, text: str) -> None:
        """Print one line."""
        if self._terminal is not None:
            self._terminal.print(text, highlight=False, markup=False, soft_wrap=True)

    def step(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
        """Print the summary row of a step; a metric that is missing shows as a dash.

        Args:
            step: the step just finished, 1-based; 0 is the evaluation before training.
            total: number of steps of the run.
            metrics: by the names of `docs/metrics.md`.
        """
        if self._terminal is None:
            return
        width = len(f"{total}/{total}") + 1
        if self._rows % HEADER_EVERY_ROWS == 0:
            header = "step".rjust(width) + "".join(heading.rjust(size) for heading, _, size, _ in COLUMNS)
            self._terminal.print(header, style="bold", highlight=False, soft_wrap=True)
        self._rows += 1
        row = f"{step}/{total}".rjust(width)
        for _, name, size, form in COLUMNS:
            value = metrics.get(name) if name else greedy_accuracy(metrics)
            row += ("-" if value is None or math.isnan(value) else format(value, form)).rjust(size)
        for name, meaning in COUNTS_WORTH_A_NOTE.items():
            if metrics.get(name):
                row += f"  {metrics[name]:.0f} {meaning}"
        self._terminal.print(row + savings(metrics), highlight=False, markup=False, soft_wrap=True)


def savings(metrics: Mapping[str, float]) -> str:
    """What each acceleration saved in a step, as a note behind its row; empty below a twentieth of a second."""
    parts = [
        f"{name} {metrics[f'saved/{name}_s']:.1f} s"
        for name in ("reuse", "drafting", "quantization")
        if abs(metrics.get(f"saved/{name}_s", 0.0)) >= LEAST_SAVING
    ]
    return f"  saved: {', '.join(parts)}" if parts else ""


def greedy_accuracy(metrics: Mapping[str, float]) -> float | None:
    """Mean greedy accuracy over the evaluation sets, in [0, 1]; None when this step has no evaluation."""
    values = [
        value for name, value in metrics.items() if name.startswith("eval/") and name.endswith("/greedy_accuracy")
    ]
    return sum(values) / len(values) if values else None


def shown(rollouts: Iterator[Rollout], total: Callable[[], int], name: str, console: Console) -> Iterator[Rollout]:
    """The same rollouts as they finish, with a progress line and their tokens per second; `total` may grow."""
    start, tokens, expected = time.perf_counter(), 0, total()
    with console.phase(name, expected) as phase:
        for rollout in rollouts:
            tokens += len(rollout.token_ids)
            phase.grow(total() - expected)
            expected = total()
            phase.advance(note=f"{tokens / (time.perf_counter() - start):,.0f} tokens/s")
            yield rollout
