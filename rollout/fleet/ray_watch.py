"""Notices that Ray itself has died, which Ray reports after a minute, or never."""

import atexit
import socket
import sys
import threading
from collections.abc import Callable

import ray

_POLL_SECONDS = 2.0
_ATTEMPTS = 3  # a busy head may miss one
_OURS = ("gcs_server", "raylet")


def lost_part() -> str | None:
    """The part of Ray that has died: a Ray process that this process started, or the head of the cluster.

    None: all are there, or this process has no Ray any more.
    """
    node = ray._private.worker.global_worker.node
    if node is None or not ray.is_initialized():
        return None
    dead = {name for name, _ in node.dead_processes()}
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
        # A run that ends early takes Ray down at the exit, before which the watch has to be over.
        atexit.register(self.close)
        self._thread = threading.Thread(target=self._watch, name="ray-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop watching; to be called before Ray is shut down."""
        atexit.unregister(self.close)
        self._over.set()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(_POLL_SECONDS):
            try:
                part = lost_part()
            except Exception:
                if ray.is_initialized():
                    raise
                return  # it was taken down at this very moment
            if part is not None and ray.is_initialized() and not self._over.is_set():
                sentence = (
                    f"Ray has died: {part}. The engines are lost with it; look for the cause (memory? `dmesg`) and "
                    "start again, which goes on from the newest checkpoint."
                )
                print(sentence, file=sys.stderr, flush=True)
                self._give_up(sentence)
                return
