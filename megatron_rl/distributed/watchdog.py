"""Names the trainer process that hangs, and what it was doing, where the others would wait for it for hours.

Every process tells the driver now and then which phase of the step it is in and how far it has got. When none has got
further for `train.hang_timeout_s`, the one that is furthest behind is the one that the others wait for.
"""

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

from torch.distributed import Store
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from megatron_rl.distributed.device import shared_store
from megatron_rl.distributed.runtime import Runtime

STATUS = 70
"""Exit status of a driver that gave up."""
WAITING = "waiting for the driver"
LONGEST_INTERVAL_S = 10.0


@dataclass(frozen=True)
class Report:
    """What one process says of itself."""

    host: str
    phase: str
    detail: str
    """The newest progress within the phase, such as `training 3/8`."""
    phases: int
    """Phases entered so far; all processes go through the same ones in the same order."""
    beats: int
    """Signs of progress within the phase."""
    still_s: float
    """Seconds since the last progress."""


def verdict(reports: Mapping[int, Report], silent_s: Mapping[int, float], timeout_s: float) -> str | None:
    """One sentence about the process that hangs, or None while there is none.

    Args:
        reports: each rank's newest report.
        silent_s: seconds since that report came.
        timeout_s: how long a process may be silent, and all together without progress.
    """
    dead = [rank for rank in sorted(reports) if silent_s[rank] >= timeout_s]
    if dead:
        rank = dead[0]
        return (
            f"rank {rank} on {reports[rank].host} has not been heard of for {silent_s[rank]:.0f} s; it was in the "
            f"phase {_phase_of(reports[rank])}."
        )
    if any(report.still_s + silent_s[rank] < timeout_s for rank, report in reports.items()):
        return None
    busy = {rank: report for rank, report in reports.items() if report.phase != WAITING} or reports
    rank = min(busy, key=lambda rank: (busy[rank].phases, busy[rank].beats, rank))
    report = busy[rank]
    return (
        f"no trainer process has got further for {timeout_s:.0f} s (train.hang_timeout_s): rank {rank} on "
        f"{report.host} hangs in the phase {_phase_of(report)}, for {report.still_s:.0f} s now."
    )


def _phase_of(report: Report) -> str:
    return f"'{report.phase}' ({report.detail})" if report.detail else f"'{report.phase}'"


class Pulse:
    """This process's progress, and on the driver the watch over everybody's."""

    def __init__(
        self,
        rank: int,
        world_size: int,
        store: Store,
        timeout_s: float | None,
        give_up: Callable[[str], None] | None = None,
    ) -> None:
        """Begin to report, and on the driver to watch.

        Args:
            rank: this process's.
            world_size: number of processes.
            store: by which reports reach the driver; for this alone.
            timeout_s: how long a process may be silent, and all together without progress; None: no watch.
            give_up: gets the driver's verdict; None: the process ends.
        """
        self._rank, self._world_size, self._store = rank, world_size, store
        self._timeout_s = timeout_s or 0.0
        self._give_up = give_up or leave
        self._phase, self._detail, self._phases, self._beats = "starting", "", 0, 0
        self._moved = time.monotonic()
        self._newest: dict[int, tuple[str, float]] = {}  # per rank its newest text and when it came
        self._sent = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._report, name="pulse", daemon=True)
        if timeout_s is not None:
            self._thread.start()

    def enter(self, phase: str) -> None:
        """This process begins a phase that every process goes through."""
        self._phase, self._detail, self._beats = phase, "", 0
        self._phases += 1
        self._moved = time.monotonic()

    def beat(self, detail: str) -> None:
        """This process has got further within its phase."""
        self._detail = detail
        self._beats += 1
        self._moved = time.monotonic()

    def close(self) -> None:
        """Stop reporting and watching."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def _report(self) -> None:
        interval = min(LONGEST_INTERVAL_S, self._timeout_s / 4)
        while not self._over.wait(interval):
            try:
                self._publish()
                if self._store.check(["health/stacks"]):
                    faulthandler.dump_traceback(sys.stderr, all_threads=True)
                    return
                if self._rank == 0 and (sentence := self._watch()) is not None:
                    # The others add where they are to their logs before the driver takes them all down.
                    self._store.set("health/stacks", "1")
                    print(sentence, file=sys.stderr, flush=True)
                    faulthandler.dump_traceback(sys.stderr, all_threads=True)
                    self._over.wait(2 * interval)
                    self._give_up(sentence)
                    return
            except RuntimeError:  # the store is gone, and with it the process that held it
                return

    def _publish(self) -> None:
        self._sent += 1  # so that no two texts are the same
        report = Report(
            socket.gethostname(),
            self._phase,
            self._detail,
            self._phases,
            self._beats,
            time.monotonic() - self._moved,
        )
        self._store.set(f"health/{self._rank}", json.dumps([self._sent, asdict(report)]))

    def _watch(self) -> str | None:
        now = time.monotonic()
        for rank in range(self._world_size):
            key = f"health/{rank}"
            if not self._store.check([key]):
                return None  # still starting: its launcher notices when it dies
            text = self._store.get(key).decode()
            if rank not in self._newest or self._newest[rank][0] != text:
                self._newest[rank] = (text, now)
        reports = {rank: Report(**json.loads(text)[1]) for rank, (text, _) in self._newest.items()}
        return verdict(reports, {rank: now - came for rank, (_, came) in self._newest.items()}, self._timeout_s)


def start_pulse(runtime: Runtime, timeout_s: float | None) -> Pulse:
    """The pulse of this trainer process; see `Pulse` for the time."""
    return Pulse(runtime.rank, runtime.world_size, shared_store(), timeout_s)


def leave(sentence: str) -> None:
    """End this process at once, and tell torchrun why: the main thread may hang where no exception reaches it."""
    get_error_handler().record_exception(RuntimeError(sentence))
    os._exit(STATUS)
