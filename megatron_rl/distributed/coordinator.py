"""Keeps all trainer processes in step while the driver works with the fleet."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from megatron_rl.distributed.runtime import Runtime
from megatron_rl.distributed.watchdog import WAITING

Result = TypeVar("Result")
Wait = Callable[[Callable[[], Any]], Any]
"""Returns what the operation that it is given, which blocks, returns."""


class Coordinator:
    """`drive` runs work on the driver and gives its result to every rank.

    While the driver generates, the other ranks wait here; the driver can call them to an action that needs all of them
    (`call`), such as sending weights to an engine that was restarted.
    """

    def __init__(self, runtime: Runtime, enter_phase: Callable[[str], None] = lambda name: None) -> None:
        """Build it on every rank.

        Args:
            runtime: this process's place.
            enter_phase: called with the phase when this rank begins to drive, or to wait for the driver.
        """
        self._runtime, self._enter_phase = runtime, enter_phase
        self._actions: dict[str, Callable[[], None]] = {}
        self._driving = self._filled = False
        self._wait: Wait = lambda operation: operation()

    def register(self, name: str, action: Callable[[], None]) -> None:
        """Make `action` known as `name`; to be done on all ranks."""
        self._actions[name] = action

    def fill_waits(self, wait: Wait) -> None:
        """From now on, this rank's waits for the driver are `wait`'s; to be called once.

        Raises:
            RuntimeError: when they are filled already.
        """
        if self._filled:
            raise RuntimeError("the waits for the driver are filled already")
        self._wait, self._filled = wait, True

    def drive(self, work: Callable[[], Result]) -> Result:
        """Run `work` on the driver alone and return its (picklable) result on every rank."""
        self._enter_phase("driving" if self._runtime.is_driver else WAITING)
        if self._runtime.is_driver:
            self._driving = True
            result = work()
            self._driving = False
            self._exchange(("result", result))
            return result
        while True:
            kind, payload = self._wait(lambda: self._exchange(None))
            if kind == "result":
                return payload  # type: ignore[no-any-return]
            self._actions[payload]()

    def call(self, action: str) -> None:
        """From inside `work`: run the action on all ranks, this one included.

        Raises:
            RuntimeError: outside `drive`, when the other ranks are not listening.
        """
        if not self._driving:
            raise RuntimeError(f"the trainer processes cannot {action} now; start the job again, it resumes.")
        self._exchange(("call", action))
        self._actions[action]()

    def _exchange(self, message: Any) -> Any:
        box = [message]
        torch.distributed.broadcast_object_list(box, src=0, group=self._runtime.control_group)
        return box[0]
