"""Which drafter, and how many draft tokens, in the next engine step: learned from the steps before.

A controller observes what every step cost and emitted, and chooses the next arm; `arms.py` has the terms. It knows
nothing of engines or tensors. There is one controller per value of `rollout.speculation.adaptive`.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_rl.config import ConfigError
from rollout.speculation.arms import PLAIN, Arm, Controller, Expectation, Step, bucket_of, make_arms
from rollout.speculation.epsilon_greedy import EpsilonGreedyController
from rollout.speculation.thompson import ThompsonController

RULES = ("off", "static", "epsilon_greedy", "thompson")  # the values of `rollout.speculation.adaptive`


def make_controller(kind: str, drafters: Sequence[str], max_draft_tokens: int, seed: int = 0) -> Controller:
    """The controller of a rule.

    Args:
        kind: the rule, as `rollout.speculation.adaptive`.
        drafters: as `rollout.speculation.drafters`; a static rule takes the first.
        max_draft_tokens: per request and step.
        seed: of the choices that are drawn at random.

    Raises:
        ConfigError: for an unknown rule, and as `make_arms` does.
    """
    if kind == "off":
        return StaticController(PLAIN)
    arms = make_arms(drafters, max_draft_tokens)
    if kind == "static":
        return StaticController(Arm(drafters[0], max_draft_tokens))
    if kind == "epsilon_greedy":
        return EpsilonGreedyController(arms, seed=seed)
    if kind == "thompson":
        return ThompsonController(arms, seed=seed)
    raise ConfigError(f"rollout.speculation.adaptive={kind!r} is not one of {', '.join(RULES)}.")


class StaticController:
    """Always the same arm."""

    def __init__(self, arm: Arm, threshold: float = 0.05) -> None:
        self.counts: Counter[tuple[int, Arm]] = Counter()
        self._arm, self._threshold = arm, threshold

    def choose(self, batch: int, expected: Mapping[Arm, Expectation]) -> Arm:
        self.counts[bucket_of(batch), self._arm] += 1
        return self._arm

    def threshold(self, batch: int) -> float:
        return self._threshold

    def knows(self, batch: int) -> bool:
        return True

    def observe(self, step: Step) -> None:
        """Nothing to learn."""

    def renew(self, drafter: str) -> None:
        """Nothing to forget."""

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""
