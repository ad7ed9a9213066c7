"""The store of earlier responses."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from megatron_rl.generation.response_store import Record, ResponseStore
from rollout.types import Rollout, TokenSource

PROMPT = [5, 6, 7]


def rollout(prompt: str = "p", sample: int = 0, length: int = 10, seed: int = 2**62 + 1) -> Rollout:
    tokens = [(seed + i) % 90 for i in range(length)]
    return Rollout(
        prompt_id=prompt,
        sample_index=sample,
        epoch=0,
        seed=seed,
        prompt_ids=PROMPT,
        token_ids=tokens,
        logprobs=[-0.25 * i for i in range(length)],
        finish_reason="length" if length % 2 else "stop",
        policy_version=3,
        sources=[TokenSource.FRESH] * length,
    )


def same(first: Record | None, second: Record | None) -> bool:
    assert first is not None and second is not None
    plain = (first.prompt, first.policy_version, first.finish_reason, first.reward, first.past.seed) == (
        second.prompt,
        second.policy_version,
        second.finish_reason,
        second.reward,
        second.past.seed,
    )
    return (
        plain
        and np.array_equal(first.past.token_ids, second.past.token_ids)
        and np.array_equal(first.past.logprobs, second.past.logprobs)
    )


def test_the_newest_response_of_a_sample_is_found_by_its_key_and_prompt() -> None:
    history = ResponseStore(2**20)
    history.put(rollout(seed=1), 0.0)
    history.put(rollout(seed=2), 1.0)
    history.put(rollout(sample=1), 0.5)
    found = history.get("p", 0, PROMPT)
    assert found is not None and len(history) == 2
    assert (found.past.seed, found.reward, found.finish_reason, found.policy_version) == (2, 1.0, "stop", 3)
    assert found.past.token_ids.tolist() == rollout(seed=2).token_ids
    assert found.past.logprobs.tolist() == rollout(seed=2).logprobs
    assert history.get("p", 2, PROMPT) is None
    assert history.get("q", 0, PROMPT) is None
    assert history.get("p", 0, [5, 6, 8]) is None, "the data set has another prompt by that name now"


def test_what_was_stored_longest_ago_is_forgotten_when_memory_is_short() -> None:
    one = rollout(length=1000)
    history = ResponseStore(20_000)
    for sample in range(4):
        history.put(replace(one, sample_index=sample), 0.0)
        history.put(replace(one, sample_index=0), 0.0)  # stored again, so never the oldest
    kept = [sample for sample in range(4) if history.get("p", sample, PROMPT)]
    assert kept == [0, 3]
    assert history.evicted == 2
    assert 16_000 < history.bytes <= 20_000
    history.put(rollout(sample=9, length=4000), 0.0)
    assert len(history) == 0 and history.bytes == 0, "one response alone is larger than all the memory"


def test_a_restored_history_is_the_same_and_forgets_in_the_same_order(tmp_path: Path) -> None:
    history = ResponseStore(30_000)
    for sample, length in enumerate((1000, 0, 7, 1500, 3)):
        history.put(rollout(sample=sample, length=length, seed=2**63 - 1 - sample), sample / 3)
    history.put(rollout(sample=0, length=5), 0.1)
    torch.save(history.state(), tmp_path / "history.pt")
    restored = ResponseStore(30_000)
    restored.put(rollout("other"), 0.0)
    restored.restore(torch.load(tmp_path / "history.pt", weights_only=True))
    assert len(restored) == len(history) == 5 and restored.bytes == history.bytes
    for sample in range(5):
        assert same(restored.get("p", sample, PROMPT), history.get("p", sample, PROMPT))
    for each in (history, restored):
        each.put(rollout("large", length=3000), 0.0)
    assert [restored.get("p", i, PROMPT) is None for i in range(5)] == [False, True, True, True, False]
    assert [history.get("p", i, PROMPT) is None for i in range(5)] == [False, True, True, True, False]
    empty = ResponseStore(30_000)
    empty.restore(ResponseStore(1).state())
    assert len(empty) == 0
