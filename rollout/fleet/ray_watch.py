"""Notices that Ray itself has died, which Ray reports after a minute, or never."""

import socket
import sys
import threading
from collections.abc import Callable

import ray

_POLL_SECONDS = 2.0
_ATTEMPTS = 3  # a busy head may miss one
_OURS = ("gcs_server", "raylet")


def lost_part() -> str | None:
    """The part of Ray that has died, or None: a Ray process that this process started, or the head of the cluster."""
    dead = {name for name, _ in ray._private.worker.global_worker.node.dead_processes()}
    for name in _OURS:
        if name in dead:
            return f"its {name}, on this machine"
    address = ray.get_runtime_context().gcs_address
    host, _, port = address.rpartition(":")
    for _ in range(_ATTEMPTS):
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_POLL_SECONDS).close()
            return None
        except OSError:
            continue
    return f"its head, at {address}"


class RayWatch:
    """Watches Ray in a thread of its own, from the construction to `close`."""

    def __init__(self, give_up: Callable[[str], None]) -> None:
        """Start the thread.

        Args:
            give_up: called from the thread with one sentence when Ray has died.
        """
        self._give_up = give_up
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="ray-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop watching; to be called before Ray is shut down."""
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(_POLL_SECONDS):
            part = lost_part()
            if part is not None and not self._over.is_set():
                sentence = (
                    f"Ray has died: {part}. The engines are lost with it; look for the cause (memory? `dmesg`) and "
                    "start again, which goes on from the newest checkpoint."
                )
                print(sentence, file=sys.stderr, flush=True)
                self._give_up(sentence)
                return
