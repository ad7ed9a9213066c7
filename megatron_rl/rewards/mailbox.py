"""Messages between a process and its fork through memory that both have, so that neither needs a descriptor."""

import mmap
import multiprocessing

CAPACITY = 16 * 2**20
"""Bytes of the longest message. Memory is taken when it is first written to."""
_LENGTH = 8


class Mailbox:
    """One message at a time, from one process to another that is forked after the mailbox was made."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _LENGTH + CAPACITY)
        # The context "fork" unlinks the semaphore's name at once and needs no tracking process.
        self._full = multiprocessing.get_context("fork").Semaphore(0)

    def put(self, message: bytes) -> None:
        """Leave a message; the one before must have been taken.

        Raises:
            ValueError: when it is longer than `CAPACITY`.
        """
        if len(message) > CAPACITY:
            raise ValueError(f"the texts are longer than {CAPACITY >> 20} MiB")
        self._memory[:_LENGTH] = len(message).to_bytes(_LENGTH, "little")
        self._memory[_LENGTH : _LENGTH + len(message)] = message
        self._full.release()

    def take(self, timeout_s: float | None = None) -> bytes | None:
        """The message, as soon as there is one; None when there is none after `timeout_s` seconds."""
        if not self._full.acquire(timeout=timeout_s):
            return None
        length = int.from_bytes(self._memory[:_LENGTH], "little")
        return self._memory[_LENGTH : _LENGTH + length]

    def close(self) -> None:
        """Give the memory back, in this process."""
        self._memory.close()
