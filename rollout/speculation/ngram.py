"""Drafts without a model: what followed the same tokens before, in this request, its siblings or any other.

The work is done by `csrc/ngram.cpp`, which describes it. (vLLM's own `suffix` method does something similar through
arctic-inference, a package that exists as source only and needs torch and a compiler at install time. Its drafts carry
no calibrated probabilities, which are needed to decide whether a draft token is worth its row.)
"""

import ctypes
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_LIBRARY = Path(__file__).with_name("_ngram.so")


def _load() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(_LIBRARY))
    except OSError:
        raise RuntimeError(
            f"The native library {'/'.join(_LIBRARY.parts[-3:])} has not been built: run `make setup`, or "
            "`pip install --no-build-isolation -e .` in your own environment."
        ) from None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.ngram_create.restype = pointer
    library.ngram_bytes.restype = number
    for name, arguments in {
        "create": [number],
        "destroy": [pointer],
        "start": [pointer, number, number, pointer, number],
        "append": [pointer, number, pointer, pointer, pointer],
        "propose": [pointer, number, pointer, pointer, number, ctypes.c_float, *[pointer] * 5],
        "finish": [pointer, number],
        "bytes": [pointer],
    }.items():
        getattr(library, f"ngram_{name}").argtypes = arguments
    return library


@dataclass(frozen=True)
class NgramDrafts:
    """The drafts of some requests; rows beyond their number are undefined."""

    tokens: NDArray[np.int32]
    """[requests, max_draft_tokens]."""
    chances: NDArray[np.float32]
    """[requests, max_draft_tokens]: probability that this token and all before it are accepted."""
    lengths: NDArray[np.int32]
    """[requests]."""
    drafted: NDArray[np.float64]
    """[max_draft_tokens + 1], by k: draft tokens of all requests with at most k each."""
    accepted: NDArray[np.float64]
    """[max_draft_tokens + 1]: how many of those are expected to be accepted."""
    addresses: tuple[int, ...]
    """Of the arrays above, in memory."""

    @classmethod
    def empty(cls, requests: int, width: int) -> "NgramDrafts":
        """Buffers for this many requests."""
        arrays = (
            np.zeros((requests, width), dtype=np.int32),
            np.zeros((requests, width), dtype=np.float32),
            np.zeros(requests, dtype=np.int32),
            np.zeros(width + 1),
            np.zeros(width + 1),
        )
        return cls(*arrays, tuple(array.ctypes.data for array in arrays))

    def token_lists(self, requests: int) -> list[list[int]]:
        """The draft of each of the first requests."""
        lengths = self.lengths[:requests].tolist()
        return [draft[:length] for draft, length in zip(self.tokens[:requests].tolist(), lengths, strict=True)]


class NgramDrafter:
    """Keeps what requests have seen and generated, and drafts from it. For use by one thread."""

    def __init__(self, max_draft_tokens: int, max_bytes: int) -> None:
        """
        Args:
            max_draft_tokens: per request and call.
            max_bytes: bound of the memory of the counts; the oldest are forgotten.

        Raises:
            RuntimeError: the native library is not built.
        """
        self._native = _load()
        self._index = ctypes.c_void_p(self._native.ngram_create(max_bytes))
        self._width = max_draft_tokens
        self._buffers = NgramDrafts.empty(64, max_draft_tokens)

    def __del__(self) -> None:
        if hasattr(self, "_index"):
            self._native.ngram_destroy(self._index)

    def start(self, request: int, group: str, prompt_ids: Sequence[int]) -> None:
        """Begin a request.

        Args:
            request: its number, unused so far.
            group: requests of one group (samples of a prompt) draft from each other.
            prompt_ids: its context.
        """
        prompt = np.asarray(prompt_ids, dtype=np.int32)
        self._native.ngram_start(self._index, request, group_number(group), prompt.ctypes.data, len(prompt))

    def extend(self, requests: Sequence[int], tokens: Sequence[Sequence[int]]) -> None:
        """Append the tokens that each request has generated."""
        ids = np.asarray(requests, dtype=np.int64)
        ends = np.cumsum([len(part) for part in tokens], dtype=np.int64)
        flat = np.array([token for part in tokens for token in part], dtype=np.int32)
        self._native.ngram_append(self._index, len(ids), ids.ctypes.data, flat.ctypes.data, ends.ctypes.data)

    def propose(self, requests: Sequence[int], limits: Sequence[int], threshold: float) -> "NgramDrafts":
        """Draft for each request; the result is valid until the next call.

        Args:
            requests: their numbers.
            limits: most draft tokens of each.
            threshold: a draft ends before the probability that all of it is accepted falls below this.
        """
        count, width = len(requests), self._width
        if count > len(self._buffers.lengths):
            self._buffers = NgramDrafts.empty(count, width)
        out = self._buffers
        ids = np.array(requests, dtype=np.int64)
        most = np.array([min(limit, width) for limit in limits], dtype=np.int32)
        self._native.ngram_propose(
            self._index, count, ids.ctypes.data, most.ctypes.data, width, threshold, *out.addresses
        )
        return out

    def finish(self, request: int) -> None:
        """End a request; what it generated stays a source of drafts."""
        self._native.ngram_finish(self._index, request)

    @property
    def bytes(self) -> int:
        """Memory of the counts."""
        size: int = self._native.ngram_bytes(self._index)
        return size


def group_number(group: str) -> int:
    """A stable 63-bit number for a group's name."""
    return int.from_bytes(hashlib.blake2b(group.encode(), digest_size=8).digest(), "big") >> 1
