"""The newest response of every sample, kept from one epoch to the next: what history drafts from.

A response is found by its stable key, (prompt id, sample index), whatever the order of an epoch, and only for the same
prompt tokens. A key that is not there is a clean miss: that sample is generated plainly.
"""

import zlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rollout.types import Past, Rollout

_FINISH_REASONS = ("stop", "length")
_RECORD_BYTES = 400  # of a record without its arrays' contents: objects, keys, the dictionary's entry
Key = tuple[str, int]
"""Prompt id, sample index."""


@dataclass(frozen=True, eq=False)
class Record:
    """One response and what is known of it."""

    past: Past
    prompt: int
    """`fingerprint` of the prompt's tokens."""
    policy_version: int
    finish_reason: str
    """`stop` or `length`."""
    reward: float

    @property
    def bytes(self) -> int:
        """Memory, nearly."""
        return _RECORD_BYTES + self.past.token_ids.nbytes + self.past.logprobs.nbytes


class ResponseStore:
    """Records by key, within a budget of memory: those that were stored longest ago are forgotten first."""

    def __init__(self, max_bytes: int) -> None:
        self.bytes = 0
        self.evicted = 0
        """Records that the budget had no room for, since the start."""
        self._max_bytes = max_bytes
        self._records: OrderedDict[Key, Record] = OrderedDict()

    def __len__(self) -> int:
        return len(self._records)

    def get(self, prompt_id: str, sample_index: int, prompt_ids: Sequence[int]) -> Record | None:
        """The newest response of this sample to these prompt tokens, or None."""
        record = self._records.get((prompt_id, sample_index))
        return record if record is not None and record.prompt == fingerprint(prompt_ids) else None

    def put(self, rollout: Rollout, reward: float) -> None:
        """Store a response in place of the sample's earlier one."""
        past = Past(
            np.array(rollout.token_ids, dtype=np.int32), np.array(rollout.logprobs, dtype=np.float32), rollout.seed
        )
        prompt = fingerprint(rollout.prompt_ids)
        record = Record(past, prompt, rollout.policy_version, rollout.finish_reason, reward)
        self._store((rollout.prompt_id, rollout.sample_index), record)

    def _store(self, key: Key, record: Record) -> None:
        if (earlier := self._records.pop(key, None)) is not None:
            self.bytes -= earlier.bytes
        self._records[key] = record
        self.bytes += record.bytes
        while self.bytes > self._max_bytes:
            _, oldest = self._records.popitem(last=False)
            self.bytes -= oldest.bytes
            self.evicted += 1

    def state(self) -> dict[str, Any]:
        """Everything, as plain values and tensors, in the order in which it would be forgotten."""
        records = list(self._records.values())
        return {
            "keys": [list(key) for key in self._records],
            "tokens": torch.from_numpy(_joined([record.past.token_ids for record in records], np.int32)),
            "logprobs": torch.from_numpy(_joined([record.past.logprobs for record in records], np.float32)),
            "numbers": torch.tensor(
                [
                    [
                        len(record.past.token_ids),
                        record.past.seed,
                        record.prompt,
                        record.policy_version,
                        _FINISH_REASONS.index(record.finish_reason),
                    ]
                    for record in records
                ],
                dtype=torch.int64,
            ),
            "rewards": torch.tensor([record.reward for record in records], dtype=torch.float64),
            "evicted": self.evicted,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Replace everything by what `state` returned, as far as the budget allows."""
        self._records.clear()
        self.bytes, begin = 0, 0
        tokens, logprobs = state["tokens"].numpy(), state["logprobs"].numpy()
        for (prompt_id, sample_index), numbers, reward in zip(
            state["keys"], state["numbers"].tolist(), state["rewards"].tolist(), strict=True
        ):
            length, seed, prompt, version, reason = numbers
            part = slice(begin, begin + length)
            past = Past(tokens[part].copy(), logprobs[part].copy(), seed)
            self._store((prompt_id, sample_index), Record(past, prompt, version, _FINISH_REASONS[reason], reward))
            begin += length
        self.evicted = state["evicted"]


def fingerprint(prompt_ids: Sequence[int]) -> int:
    """A number that tells prompts apart."""
    return zlib.crc32(np.asarray(prompt_ids, dtype=np.int32).tobytes())


def _joined(arrays: list[Any], dtype: type[np.generic]) -> Any:
    return np.concatenate([np.empty(0, dtype), *arrays])
