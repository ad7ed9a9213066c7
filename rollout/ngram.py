"""Drafts without a model: what followed the same tokens before, in this request, its siblings or any other.

The work is done by `csrc/ngram.cpp`, which see. (vLLM's own `suffix` method does the like through arctic-inference, a
package that exists as source only and whose build wants torch and a compiler at install time; and its drafts carry no
calibrated chances, which is what decides whether a draft is worth its row.)
"""

import ctypes
import hashlib
from collections.abc import Sequence
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
        "propose": [pointer, number, pointer, pointer, number, ctypes.c_float, pointer, pointer, pointer],
        "finish": [pointer, number],
        "bytes": [pointer],
    }.items():
        getattr(library, f"ngram_{name}").argtypes = arguments
    return library


class NgramDrafter:
    """Keeps what requests have seen and generated, and drafts from it. For use by one thread."""

    def __init__(self, max_draft_tokens: int, max_bytes: int) -> None:
        """`max_bytes` bounds the memory of the counts; the oldest are forgotten.

        Raises RuntimeError when the native part is not built.
        """
        self._native = _load()
        self._index = ctypes.c_void_p(self._native.ngram_create(max_bytes))
        self._width = max_draft_tokens

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

    def propose(
        self, requests: Sequence[int], limits: Sequence[int], threshold: float
    ) -> tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.int32]]:
        """Drafts of at most `limits[i]` tokens for each request.

        Returns token ids [requests, max_draft_tokens], the chance that a draft token and all before it are right (at
        least `threshold`, of the same shape, 0 past the end), and the lengths [requests].
        """
        count = len(requests)
        ids = np.asarray(requests, dtype=np.int64)
        most = np.minimum(np.asarray(limits, dtype=np.int32), self._width)
        tokens = np.zeros((count, self._width), dtype=np.int32)
        chances = np.zeros((count, self._width), dtype=np.float32)
        lengths = np.zeros(count, dtype=np.int32)
        self._native.ngram_propose(
            self._index,
            count,
            ids.ctypes.data,
            most.ctypes.data,
            self._width,
            threshold,
            tokens.ctypes.data,
            chances.ctypes.data,
            lengths.ctypes.data,
        )
        return tokens, chances, lengths

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
