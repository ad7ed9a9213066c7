"""Drafts without a model: what followed the same tokens before, in this request, its siblings or any other.

The work is done by `csrc/ngram.cpp`, which see. (vLLM's own `suffix` method does the like through arctic-inference, a
package that exists as source only and whose build wants torch and a compiler at install time; and its drafts carry no
calibrated chances, which is what decides whether a draft is worth its row.)
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
            f"{_LIBRARY.name} is not built; run `make setup` in the repository, or `pip install -e .` again."
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
class Drafts:
    """The drafts of some requests; rows past their number hold nothing of meaning."""

    tokens: NDArray[np.int32]  # [requests, max_draft_tokens]
    chances: NDArray[np.float32]  # the same shape: that this token and all before it are right
    lengths: NDArray[np.int32]  # [requests]
    drafted: NDArray[np.float64]  # [max_draft_tokens + 1]: draft tokens with at most k per request, all requests
    accepted: NDArray[np.float64]  # [max_draft_tokens + 1]: how many of those will be right
    addresses: tuple[int, ...]

    @classmethod
    def empty(cls, requests: int, width: int) -> "Drafts":
        """Room for so many requests."""
        arrays = (
            np.zeros((requests, width), dtype=np.int32),
            np.zeros((requests, width), dtype=np.float32),
            np.zeros(requests, dtype=np.int32),
            np.zeros(width + 1),
            np.zeros(width + 1),
        )
        return cls(*arrays, tuple(array.ctypes.data for array in arrays))


class NgramDrafter:
    """Keeps what requests have seen and generated, and drafts from it. For use by one thread."""

    def __init__(self, max_draft_tokens: int, max_bytes: int) -> None:
        """`max_bytes` bounds the memory of the counts; the oldest are forgotten.

        Raises RuntimeError when the native part is not built.
        """
        self._native = _load()
        self._index = ctypes.c_void_p(self._native.ngram_create(max_bytes))
        self._width = max_draft_tokens
        self._buffers = Drafts.empty(64, max_draft_tokens)

    def __del__(self) -> None:
        if hasattr(self, "_index"):
            self._native.ngram_destroy(self._index)

    def start(self, request: int, group: str, prompt_ids: Sequence[int]) -> None:
        """A request with this number begins; requests of one group (samples of a prompt) draft from each other."""
        prompt = np.asarray(prompt_ids, dtype=np.int32)
        self._native.ngram_start(self._index, request, group_number(group), prompt.ctypes.data, len(prompt))

    def extend(self, requests: Sequence[int], tokens: Sequence[Sequence[int]]) -> None:
        """Each request has generated these tokens."""
        ids = np.asarray(requests, dtype=np.int64)
        ends = np.cumsum([len(part) for part in tokens], dtype=np.int64)
        flat = np.array([token for part in tokens for token in part], dtype=np.int32)
        self._native.ngram_append(self._index, len(ids), ids.ctypes.data, flat.ctypes.data, ends.ctypes.data)

    def propose(self, requests: Sequence[int], limits: Sequence[int], threshold: float) -> "Drafts":
        """Drafts of at most `limits[i]` tokens for each request.

        A draft ends before the chance that all of it is right falls below `threshold`. What is returned is valid until
        the next call.
        """
        count, width = len(requests), self._width
        if count > len(self._buffers.lengths):
            self._buffers = Drafts.empty(count, width)
        out = self._buffers
        ids = np.array(requests, dtype=np.int64)
        most = np.array([min(limit, width) for limit in limits], dtype=np.int32)
        self._native.ngram_propose(
            self._index, count, ids.ctypes.data, most.ctypes.data, width, threshold, *out.addresses
        )
        return out

    def finish(self, request: int) -> None:
        """The request has ended; what it generated stays a source of drafts."""
        self._native.ngram_finish(self._index, request)

    @property
    def bytes(self) -> int:
        """Memory of the counts."""
        size: int = self._native.ngram_bytes(self._index)
        return size


def group_number(group: str) -> int:
    """A stable 63-bit number for a group's name."""
    return int.from_bytes(hashlib.blake2b(group.encode(), digest_size=8).digest(), "big") >> 1
