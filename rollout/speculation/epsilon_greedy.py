"""The rule `epsilon_greedy`: the arm with the best recent rate, sometimes a random one (FastRL's tuner, per bucket)."""

import random
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import Any

from megatron_rl.config import ConfigError
from rollout.speculation.arms import PLAIN, SWITCH_GAIN, Arm, Expectation, Step, bucket_of, check_arms

WINDOW = 96
"""Steps over which a median is taken; older ones are forgotten."""
HOLD_STEPS = 4
"""Steps between decisions."""


class _Holding:
    """Keeps a bucket's arm for some steps, and as long as no other arm is clearly better; counts the choices."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[int, Arm]] = Counter()
        self._current: dict[int, Arm] = {}
        self._trial = PLAIN  # the arm in use
        self._bucket, self._held = 0, 0

    def keep(self, bucket: int) -> Arm | None:
        """The arm to stay with, or None when a decision is due."""
        due = bucket != self._bucket or self._held >= HOLD_STEPS or bucket not in self._current
        if due:
            return None
        return self._use(bucket, self._trial)

    def decide(self, bucket: int, rates: Mapping[Arm, float]) -> Arm:
        """The best arm, or the current one when that is nearly as good."""
        best = max(rates, key=lambda arm: (rates[arm], -arm.k))
        current = self._current.get(bucket, PLAIN)
        if current in rates and rates[best] < rates[current] * SWITCH_GAIN:
            best = current
        return self.take(bucket, best)

    def take(self, bucket: int, arm: Arm, explore: bool = False) -> Arm:
        """Use an arm from now on; with `explore`, only until the next decision."""
        self._held, self._trial = 0, arm
        if not explore:
            self._current[bucket] = arm
        return self._use(bucket, arm)

    def _use(self, bucket: int, arm: Arm) -> Arm:
        self._bucket, self._held = bucket, self._held + 1
        self.counts[bucket, arm] += 1
        return arm


class EpsilonGreedyController:
    """Bucketed epsilon-greedy: per bucket the arm with the highest recent rate, occasionally a random one.

    The rate is the mean of the tokens over the median of the seconds: a pause is an outlier, but a step that emits many
    tokens is not, and for few requests the median of the tokens hides what long drafts emit.
    """

    def __init__(self, arms: Sequence[Arm], epsilon: float = 0.03, window: int = WINDOW, seed: int = 0) -> None:
        """
        Args:
            arms: to choose among, `PLAIN` included.
            epsilon: probability of a random arm at a decision.
            window: steps per bucket and arm that the rate is taken over.
            seed: of the random choices.

        Raises:
            ConfigError: when `arms` lacks `PLAIN` or repeats an arm, or for epsilon outside [0, 1].
        """
        check_arms(arms)
        if not 0 <= epsilon <= 1:
            raise ConfigError(f"epsilon={epsilon} must be between 0 and 1.")
        self._arms, self._epsilon, self._window = list(arms), epsilon, window
        self._steps: dict[tuple[int, Arm], deque[tuple[float, float]]] = {}  # tokens per request, seconds per request
        self._holding, self._random = _Holding(), random.Random(seed)
        self.counts = self._holding.counts

    def choose(self, batch: int, expected: Mapping[Arm, Expectation]) -> Arm:
        bucket = bucket_of(batch)
        if (kept := self._holding.keep(bucket)) is not None:
            return kept
        arms = [arm for arm in self._arms if arm not in expected or expected[arm][0]]
        untried = [arm for arm in arms if (bucket, arm) not in self._steps]
        if untried:
            return self._holding.take(bucket, untried[0])
        if self._random.random() < self._epsilon:
            return self._holding.take(bucket, self._random.choice(arms), explore=True)
        return self._holding.decide(bucket, {arm: _rate(self._steps[bucket, arm]) for arm in arms})

    def threshold(self, batch: int) -> float:
        return 0.05

    def knows(self, batch: int) -> bool:
        return all((bucket_of(batch), arm) in self._steps for arm in self._arms)

    def observe(self, step: Step) -> None:
        steps = self._steps.setdefault((bucket_of(step.batch), step.arm), deque(maxlen=self._window))
        steps.append((step.emitted / step.batch, step.seconds / step.batch))

    def renew(self, drafter: str) -> None:
        """The window forgets by itself."""

    def state(self) -> dict[str, Any]:
        return {
            "steps": [
                [bucket, arm.drafter, arm.k, [list(step) for step in steps]]
                for (bucket, arm), steps in self._steps.items()
            ]
        }

    def restore(self, state: dict[str, Any]) -> None:
        for bucket, drafter, k, steps in state["steps"]:
            if (arm := Arm(drafter, k)) in self._arms:
                self._steps[bucket, arm] = deque(((tokens, seconds) for tokens, seconds in steps), maxlen=self._window)


def _rate(steps: deque[tuple[float, float]]) -> float:
    tokens, seconds = zip(*steps, strict=True)
    return fmean(tokens) / median(seconds)
