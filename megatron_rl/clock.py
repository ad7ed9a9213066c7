"""How long the phases of a step take."""

import contextlib
import time
from collections.abc import Callable, Iterator

from megatron_rl.metrics import Metrics


class Clock:
    """Seconds per phase of the current step."""

    def __init__(self, enter_phase: Callable[[str], None] = lambda name: None) -> None:
        """Begin a first step.

        Args:
            enter_phase: called with the name of each phase as it begins.
        """
        self.seconds: Metrics = {}
        """Of the phases that are over, by the names of `docs/metrics.md`."""
        self._enter_phase = enter_phase
        self._started = time.perf_counter()

    def start(self) -> None:
        """Begin a step."""
        self.seconds = {}
        self._started = time.perf_counter()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure a block as `time/<name>`."""
        self._enter_phase(name)
        start = time.perf_counter()
        yield
        self.seconds[f"time/{name}"] = time.perf_counter() - start

    def elapsed(self) -> float:
        """Seconds since `start`."""
        return time.perf_counter() - self._started
