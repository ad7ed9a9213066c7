"""Which prompts a step visits, and with which seeds: pure functions of numbers, so resuming needs only these."""

import hashlib
from functools import lru_cache

import numpy as np


class PromptOrder:
    """Epoch-wise shuffled order of `num_prompts` prompts, `prompts_per_step` at a time.

    Every epoch visits every prompt once, in a permutation drawn from (seed, epoch). A step may straddle epochs. Nothing
    here depends on the parallel layout or on earlier calls.
    """

    def __init__(self, num_prompts: int, prompts_per_step: int, seed: int) -> None:
        if num_prompts < 1 or prompts_per_step < 1:
            raise ValueError("num_prompts and prompts_per_step must be positive")
        self.num_prompts = num_prompts
        self.prompts_per_step = prompts_per_step
        self.seed = seed

    def indices(self, step: int) -> list[tuple[int, int]]:
        """(prompt index, epoch) of the prompts of `step`; steps count from 0."""
        first = step * self.prompts_per_step
        return [self.visit(position) for position in range(first, first + self.prompts_per_step)]

    def visit(self, position: int) -> tuple[int, int]:
        """(prompt index, epoch) at a position of the whole order, counted from 0."""
        epoch, place = divmod(position, self.num_prompts)
        return int(_permutation(self.num_prompts, self.seed, epoch)[place]), epoch


@lru_cache(maxsize=4)
def _permutation(num_prompts: int, seed: int, epoch: int) -> np.ndarray:
    # Philox keys are unsigned; a negative seed wraps to its own key.
    key = np.array([seed % 2**64, epoch], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).permutation(num_prompts)


def rollout_seed(run_seed: int, step: int, prompt_id: str, sample_index: int, epoch: int = 0) -> int:
    """Seed of one training rollout, in [0, 2**63): fresh for every (run, step, prompt, sample).

    `epoch` tells apart two visits to the same prompt within a step that straddles epochs.
    """
    return _stable_hash("rollout", run_seed, step, prompt_id, sample_index, epoch)


def evaluation_seed(run_seed: int, step: int, prompt_id: str, sample_index: int) -> int:
    """Seed of one evaluation response, in [0, 2**63); never a training rollout's seed but by chance."""
    return _stable_hash("evaluation", run_seed, step, prompt_id, sample_index)


def is_refreshed(run_seed: int, epoch: int, prompt_id: str, sample_index: int, rate: float) -> bool:
    """Whether this sample is among the share `rate` whose earlier response is not to be reused in this epoch."""
    return _stable_hash("refresh", run_seed, epoch, prompt_id, sample_index) < rate * 2**63


def _stable_hash(*parts: str | int) -> int:
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
