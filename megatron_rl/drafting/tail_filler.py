"""Idle tails: while the engines finish the last rollouts of a step, the trainer processes run slices of other work."""

from collections.abc import Callable, Iterator
from typing import TypeVar

from drafter.idle_time.timeline import Timeline
from drafter.idle_time.wait_filler import ThreadFill
from megatron_rl.distributed.coordinator import Coordinator

Item = TypeVar("Item")
BEGIN = "fill the tail of a generation"


class TailFiller:
    """Fills the waits of all trainer ranks from the moment that a generation is nearly done.

    The driver knows when that is, and calls the other ranks; from then on they fill their waits for it (its rewards
    included), until `end`. The waiting itself is done by the helper thread of `fill`; every rank is back within one
    slice.
    """

    def __init__(self, fill: ThreadFill, coordinator: Coordinator, begins_at: float) -> None:
        """Take over this rank's waits for the driver.

        Args:
            fill: how waits are filled here.
            coordinator: its waits are filled.
            begins_at: share of the rollouts that are done when the tail begins; 0 where the trainer's devices are idle
                during all of a generation. Before, filling would only slow down the engines that share the devices.
        """
        self._fill, self._coordinator, self._begins_at = fill, coordinator, begins_at
        self._in_tail = False
        self.enabled = True
        """Set between steps, by the guard's decision; the driver's counts."""
        self.available = self.filled = 0.0
        """Seconds of this rank since `end` returned them last."""
        self.timeline = Timeline()
        coordinator.register(BEGIN, self._begin)
        coordinator.fill_waits(self._wait)

    def watch(self, items: Iterator[Item], total: int) -> Iterator[Item]:
        """On the driver, inside `Coordinator.drive`: the same items, of which `total` will come."""
        for done in range(total):
            if self.enabled and not self._in_tail and done >= self._begins_at * total:
                self._coordinator.call(BEGIN)
            # The iterator's own end would not pass through a thread.
            box = self._wait(lambda: [item for item in [next(items, None)] if item is not None])
            if not box:
                return
            yield box[0]
        self._in_tail = False  # what follows on the driver is work
        yield from items

    def end(self) -> tuple[float, float]:
        """The generation is over. Returns the seconds available and filled."""
        self._in_tail = False
        seconds = self.available, self.filled
        self.available = self.filled = 0.0
        return seconds

    def _begin(self) -> None:
        self._in_tail = True

    def _wait(self, operation: Callable[[], Item]) -> Item:
        if not self._in_tail:
            return operation()
        start = self._fill.runner.clock()
        result, end, filled = self._fill.during(operation, float("inf"))
        self.available += end - start
        self.filled += filled.seconds(start, end)
        self.timeline.add_wait(start, end, end, filled.spans, "tail")
        return result  # type: ignore[no-any-return]
