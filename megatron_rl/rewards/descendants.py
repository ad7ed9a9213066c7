"""The processes that a process has started, however deep, and their end. Linux only; elsewhere nothing is found."""

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Collection
from pathlib import Path

LINUX = sys.platform == "linux"
KILL_TIMEOUT_S = 5.0
"""A process in the middle of a device's or a file system's call ends only after it."""
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def adopt_orphans() -> None:
    """From now on, processes below this one whose parent ends become children of this one, not of the system's first:
    a daemon cannot get away."""
    if LINUX:
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def signal_when_parent_ends(number: int) -> None:
    """Have this process sent a signal when the thread that started it ends."""
    if LINUX:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)


def descendants(root: int, without: Collection[int] = ()) -> set[int]:
    """The living processes below `root`, without those in `without` and what is below these."""
    children: defaultdict[int, list[int]] = defaultdict(list)
    for entry in os.listdir("/proc") if LINUX else ():
        if entry.isdigit():
            # A process may end while we look; its name, in parentheses, may hold anything.
            with contextlib.suppress(OSError):
                state, parent = Path("/proc", entry, "stat").read_text(errors="replace").rpartition(")")[2].split()[:2]
                children[int(parent)].append(int(entry) if state not in "ZX" else -int(entry))
    found: set[int] = set()
    ahead = [root]
    while ahead:
        for child in children[ahead.pop()]:
            # A dead process that its parent has not asked for has no children left, and cannot be killed again.
            if child > 0 and child not in without:
                found.add(child)
                ahead.append(child)
    return found


def kill_descendants(root: int, without: Collection[int] = ()) -> None:
    """Kill what `descendants` finds, until it finds nothing."""
    deadline = time.monotonic() + KILL_TIMEOUT_S
    while (found := descendants(root, without)) and time.monotonic() < deadline:
        # Stopped ones start no others while the rest of them are killed.
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in found:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, number)
        reap_children()


def reap_children() -> None:
    """Ask for the children that have ended, so that nothing of them stays."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG) != (0, 0):
            pass


def has_children() -> bool:
    """Whether this process has children, dead ones among them. Takes a microsecond."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True
