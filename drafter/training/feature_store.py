"""Keeps the head's training data: windows of rollouts with their hidden states, in bounded host memory."""

import random
from dataclasses import dataclass

from torch import Tensor

from drafter.eagle.packed_rows import PackedFeatures, pack


@dataclass(frozen=True)
class _Sample:
    version: int
    features: PackedFeatures
    bytes: int


def size_in_bytes(features: PackedFeatures) -> int:
    """Memory of a row's tensors; a tensor that is used in two fields counts once."""
    tensors = {id(value): value for value in vars(features).values() if isinstance(value, Tensor)}
    return sum(tensor.nbytes for tensor in tensors.values())


class FeatureStore:
    """Windows by policy version. Rows of the newest version come first, those of old versions are evicted first.

    The order is drawn from (seed, newest version, pass): the same numbers and the same content give the same rows.
    """

    def __init__(self, max_bytes: int, tokens_per_row: int, seed: int = 0) -> None:
        """
        Args:
            max_bytes: bound of all windows together, the held-out ones included.
            tokens_per_row: windows are packed into rows of at most this many tokens (a longer one is a row by itself).
            seed: of the order.
        """
        self.max_bytes, self.tokens_per_row, self.seed = max_bytes, tokens_per_row, seed
        self._samples: list[_Sample] = []
        self._held_out: list[_Sample] = []
        self._newest = self._passes = 0
        self._order: list[_Sample] = []
        self._position = 0

    def __len__(self) -> int:
        """Windows to train on."""
        return len(self._samples)

    @property
    def bytes(self) -> int:
        """Memory in use."""
        return sum(sample.bytes for sample in self._samples + self._held_out)

    def add(self, version: int, rows: list[PackedFeatures], held_out: list[PackedFeatures]) -> None:
        """Add the windows of a policy version, each a row of one sequence, and start over with the newest of all.

        Held-out windows of other versions are dropped. Beyond `max_bytes` the oldest windows are dropped, then the last
        ones of `rows`; `held_out` is truncated if it alone does not fit.

        Args:
            version: of the policy that computed the features.
            rows: windows to train on.
            held_out: windows to evaluate on.
        """
        self._held_out = _fitting([_sample(version, row) for row in held_out], self.max_bytes)
        room = self.max_bytes - sum(sample.bytes for sample in self._held_out)
        newest = [_sample(version, row) for row in rows]
        older = sorted(self._samples, key=lambda sample: -sample.version)
        self._samples = _fitting(newest + older, room)
        self._newest = version
        self._begin_pass(1)

    def next_windows(self, most_tokens: int) -> list[int]:
        """Tokens of each window in the next row.

        Empty when there are no windows. After the last window it starts over.

        Args:
            most_tokens: of the row; a longer window is a row by itself.
        """
        if self._samples and self._position == len(self._order):
            self._begin_pass(self._passes + 1)
        lengths: list[int] = []
        for sample in self._order[self._position :]:
            lengths.append(len(sample.features.token_ids))
            if sum(lengths) > most_tokens and len(lengths) > 1:
                return lengths[:-1]
        return lengths

    def take(self, windows: int) -> PackedFeatures:
        """The next windows as one row; `windows` is the length of what `next_windows` returned."""
        first, self._position = self._position, self._position + windows
        return pack([sample.features for sample in self._order[first : self._position]])

    def held_out_rows(self) -> list[PackedFeatures]:
        """The held-out windows of the newest version, packed into rows."""
        rows: list[list[PackedFeatures]] = []
        tokens = 0
        for sample in self._held_out:
            length = len(sample.features.token_ids)
            if not rows or tokens + length > self.tokens_per_row:
                rows.append([])
                tokens = 0
            rows[-1].append(sample.features)
            tokens += length
        return [pack(row) for row in rows]

    def forget(self) -> None:
        """Drop all windows.

        They are not part of a checkpoint, because they would be most of it. A run that forgets them when it saves a
        checkpoint continues exactly as one that resumes from it.
        """
        self._samples, self._held_out = [], []
        self._order, self._position = [], 0

    def _begin_pass(self, number: int) -> None:
        self._passes, self._position, self._order = number, 0, []
        for version in sorted({sample.version for sample in self._samples}, reverse=True):
            samples = [sample for sample in self._samples if sample.version == version]
            random.Random(f"{self.seed}/{self._newest}/{number}/{version}").shuffle(samples)
            self._order += samples


def _sample(version: int, features: PackedFeatures) -> _Sample:
    return _Sample(version, features, size_in_bytes(features))


def _fitting(samples: list[_Sample], room: int) -> list[_Sample]:
    """The first ones, as many as fit."""
    kept = []
    for sample in samples:
        room -= sample.bytes
        if room < 0:
            break
        kept.append(sample)
    return kept
