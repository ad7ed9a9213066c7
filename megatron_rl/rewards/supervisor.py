"""Between the run and the process that runs a reward: holds the pipes, and ends what the reward leaves behind.

No user code runs here, so this process always answers. It outlives a run that is killed by a moment, and takes all
that the reward has started with it.
"""

import contextlib
import json
import os
import select
import shutil
import signal
import struct
import tempfile
import time
from types import FrameType
from typing import Any

from megatron_rl.rewards.builtin import BUILTIN
from megatron_rl.rewards.descendants import (
    adopt_orphans,
    descendants,
    kill_descendants,
    reap_children,
    signal_when_parent_ends,
)
from megatron_rl.rewards.mailbox import Mailbox
from megatron_rl.rewards.scoring_process import resolve, serve

REQUEST = struct.Struct("<Qd")
"""Before each request: its length in bytes, and the seconds that scoring may take."""
REPLY = struct.Struct("<Q")
"""Before each reply: its length in bytes."""
START_TIMEOUT_S = 120.0
"""Importing a user's module may take long (torch, a reward model); it does not count as scoring time."""
LOOK_EVERY_S = 0.05
"""Between two looks at whether the process has ended, while it is waited for."""


class _RunEndedError(Exception):
    """The run closed its pipe, or ended."""


class Pipe:
    """This process's end of the pipes to the run."""

    def __init__(self) -> None:
        self._requests, self._replies = os.dup(0), os.dup(1)
        # What a reward prints must not end up among the replies.
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)
        os.dup2(2, 1)
        self._poll = select.poll()
        self._poll.register(self._requests, select.POLLIN)

    def request(self, wait_s: float | None) -> tuple[bytes, float] | None:
        """A request with its time limit in seconds, or None when there is none within `wait_s` seconds."""
        if not self._poll.poll(None if wait_s is None else max(wait_s, 0) * 1000):
            return None
        length, timeout_s = REQUEST.unpack(self._read(REQUEST.size))
        return self._read(length), timeout_s

    def reply(self, reply: dict[str, Any]) -> None:
        content = json.dumps(reply).encode()
        content = REPLY.pack(len(content)) + content
        try:
            while content:
                content = content[os.write(self._replies, content) :]
        except BrokenPipeError:
            raise _RunEndedError from None

    def check(self) -> None:
        """While a request is being answered, nothing but the end of the run can make the pipe readable.

        Raises:
            _RunEndedError: when that is so.
        """
        if self._poll.poll(0):
            raise _RunEndedError

    def _read(self, length: int) -> bytes:
        parts = []
        while length:
            part = os.read(self._requests, min(length, 2**20))
            if not part:
                raise _RunEndedError
            parts.append(part)
            length -= len(part)
        return b"".join(parts)


class Host:
    """The process of the reward, forked when it is first needed and again after it was stopped."""

    def __init__(self, name: str, pipe: Pipe) -> None:
        self._name, self._pipe = name, pipe
        self._pid: int | None = None
        self._helpers: set[int] = set()
        """Processes that importing the reward started: they stay as long as this one."""
        self._temporary = tempfile.mkdtemp(prefix="megatron-rl-reward-")
        self.retire_at: float | None = None
        """When threads that a call left must be gone, and the process with them (`time.monotonic`)."""

    def start(self) -> dict[str, Any]:
        """Fork, and wait until the reward is imported; with `error` when that is impossible."""
        os.makedirs(self._temporary, mode=0o700, exist_ok=True)
        self._requests, self._replies = Mailbox(), Mailbox()
        pid = os.fork()
        if pid == 0:
            serve(self._name, self._requests, self._replies, self._temporary)
        self._pid = pid
        ready = self._wait(START_TIMEOUT_S)
        if ready is None:
            ready = {"error": f"importing it took more than {START_TIMEOUT_S:g} seconds"}
        if "error" in ready:
            self.stop()
        else:
            self._helpers = descendants(pid)
        return ready

    def ask(self, message: bytes, timeout_s: float) -> dict[str, Any]:
        """The reply to a request: that of the process, or `error`, or `timed_out`."""
        if self._pid is not None and self._status() is not None:
            self.stop()  # it ended by itself after its last reply
        if self._pid is None and "error" in (ready := self.start()):
            return ready
        start = time.monotonic()
        try:
            self._requests.put(message)
        except ValueError as error:
            return {"error": str(error)}
        reply = self._wait(timeout_s)
        if reply is None:
            self.stop()
            return {"timed_out": True}
        if reply.pop("children", False) and self._pid is not None:
            kill_descendants(self._pid, self._helpers)
        if reply.get("threads") and self.retire_at is None:
            self.retire_at = start + timeout_s
        self.retire()
        return reply

    def retire(self) -> None:
        """Stop the process if it is time to."""
        if self.retire_at is not None and time.monotonic() >= self.retire_at:
            self.stop()

    def _wait(self, timeout_s: float) -> dict[str, Any] | None:
        """The next reply of the process, or None when there is none in time."""
        deadline = time.monotonic() + timeout_s
        assert self._pid is not None
        while (remaining := deadline - time.monotonic()) > 0:
            content = self._replies.take(min(remaining, LOOK_EVERY_S))
            if content is None:
                self._pipe.check()
                status = self._status()
                if status is None:
                    continue
                content = self._replies.take(0)
                if content is None:
                    self.stop()
                    return {"error": _how_it_ended(status)}
            reply: dict[str, Any] = json.loads(content)
            return reply
        return None

    def _status(self) -> int | None:
        """The exit code of the process (a signal as a negative number), or None while it runs."""
        assert self._pid is not None
        try:
            ended, status = os.waitpid(self._pid, os.WNOHANG)
        except ChildProcessError:  # reaped beside what it left behind
            return -signal.SIGKILL
        return os.waitstatus_to_exitcode(status) if ended else None

    def stop(self) -> None:
        """End the process and everything that it has started, and remove its temporary files."""
        kill_descendants(os.getpid())
        reap_children()
        if self._pid is not None:
            self._requests.close()
            self._replies.close()
        self._pid, self.retire_at, self._helpers = None, None, set()
        shutil.rmtree(self._temporary, ignore_errors=True)


def _how_it_ended(code: int) -> str:
    if code >= 0:
        return f"its process ended with exit code {code}"
    return f"its process was ended by {signal.Signals(-code).name}"


def main(name: str, run: int) -> None:
    """Answer the requests for the reward called `name` of the run whose process is `run`, until its pipe is closed."""

    def end_with_run(number: int, frame: FrameType | None) -> None:
        # A cluster's SIGTERM to all processes of a job asks the run to save first, and that takes rewards.
        if os.getppid() != run:
            raise _RunEndedError

    adopt_orphans()
    signal.signal(signal.SIGTERM, end_with_run)
    signal_when_parent_ends(signal.SIGTERM)
    pipe = Pipe()
    host = Host(name, pipe)
    try:
        if os.getppid() != run:  # it ended before the signal was asked for
            return
        if name in BUILTIN:
            resolve(name)  # so that no fork has to import it again
        pipe.reply(host.start())
        while True:
            request = pipe.request(None if host.retire_at is None else host.retire_at - time.monotonic())
            if request is None:
                host.retire()
            else:
                pipe.reply(host.ask(*request))
    except _RunEndedError:
        pass
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with contextlib.suppress(OSError):
            host.stop()
