"""Shows a generation while it runs."""

import time
from collections.abc import Callable, Iterator

from megatron_rl.observability.console import Console
from rollout.types import Rollout


def shown(rollouts: Iterator[Rollout], total: Callable[[], int], name: str, console: Console) -> Iterator[Rollout]:
    """The same rollouts as they finish, with a progress line and their tokens per second; `total` may grow."""
    start, tokens, expected = time.perf_counter(), 0, total()
    with console.phase(name, expected) as phase:
        for rollout in rollouts:
            tokens += len(rollout.token_ids)
            phase.grow(total() - expected)
            expected = total()
            phase.advance(note=f"{tokens / (time.perf_counter() - start):,.0f} tokens/s")
            yield rollout
