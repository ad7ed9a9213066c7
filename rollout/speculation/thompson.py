"""The rule `thompson`: a latency model and acceptance estimates predict the rate of every arm (Thompson sampling).

Both are drawn from their uncertainty, so that few trials per bucket and arm suffice.
"""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rollout.speculation.acceptance_model import AcceptanceModel
from rollout.speculation.arms import (
    EAGLE,
    NGRAM,
    PLAIN,
    SWITCH_GAIN,
    Arm,
    Expectation,
    Step,
    bucket_of,
    check_arms,
)
from rollout.speculation.latency_model import LatencyModel

TRIALS = 3
"""Steps with each drafter in each bucket, whatever their forecast: before they are measured it is a guess."""
HOPELESS = 0.1
"""A drafter whose first token is accepted less often than this gets no trial: it would not pay even if it were free."""


class ThompsonController:
    """Predicts each arm's rate from latency(batch, draft tokens) and the acceptance of its drafts.

    Every drafter has a latency model of its own, because making drafts costs time too; steps without drafts belong to
    all of them.
    """

    def __init__(self, arms: Sequence[Arm], seed: int = 0) -> None:
        """
        Args:
            arms: to choose among, `PLAIN` included.
            seed: of the draws from the predictions' uncertainty.

        Raises:
            ConfigError: when `arms` lacks `PLAIN` or repeats an arm.
        """
        check_arms(arms)
        self._arms = sorted(arms, key=lambda arm: arm.k)
        self._acceptance = {arm.drafter: AcceptanceModel() for arm in arms if arm.k}
        self._latency = {name: LatencyModel(serial=name == EAGLE) for name in self._acceptance}
        self._trust = 1.0  # accepted tokens per token that drafters expected to be accepted
        self._current: dict[int, Arm] = {}
        self._trials: Counter[tuple[int, str]] = Counter()
        self._random = random.Random(seed)
        self._expected: Mapping[Arm, Expectation] = {}
        self.counts: Counter[tuple[int, Arm]] = Counter()

    def choose(self, batch: int, expected: Mapping[Arm, Expectation]) -> Arm:
        self._expected = expected
        bucket = bucket_of(batch)
        rates: dict[Arm, float] = {}
        forecasts: dict[tuple[str, float], float] = {}
        untried: list[Arm] = []
        for arm in self._arms:
            drafted, accepted = self._forecast(arm, batch, expected)
            if (arm.drafter, drafted) not in forecasts:  # otherwise a longer limit that no draft reaches
                forecasts[arm.drafter, drafted] = (batch + accepted) / self._seconds(arm, batch, drafted)
            rates[arm] = forecasts[arm.drafter, drafted]
            if drafted and self._needs_trial(arm.drafter, bucket):
                untried.append(arm)
        best = max(rates, key=rates.__getitem__)
        current = self._current.get(bucket, PLAIN)
        if rates[best] < rates[PLAIN] * SWITCH_GAIN:
            best = PLAIN  # forecasts are off by some percent, and plain decoding must not be slowed down
        elif rates[best] < rates[current] * SWITCH_GAIN:
            best = current
        self._current[bucket] = best
        if untried and best not in untried:
            best = max(untried, key=rates.__getitem__)
        self.counts[bucket, best] += 1
        return best

    def knows(self, batch: int) -> bool:
        return not any(self._needs_trial(drafter, bucket_of(batch)) for drafter in self._acceptance)

    def _needs_trial(self, drafter: str, bucket: int) -> bool:
        return self._trials[bucket, drafter] < TRIALS and self._acceptance[drafter].likely() >= HOPELESS

    def _seconds(self, arm: Arm, batch: int, drafted: float) -> float:
        name = arm.drafter if drafted else PLAIN.drafter
        return self._latency_of(arm).draw(name, batch, drafted, self._random)

    def _latency_of(self, arm: Arm) -> LatencyModel:
        return self._latency.get(arm.drafter, next(iter(self._latency.values())))

    def _forecast(self, arm: Arm, batch: int, expected: Mapping[Arm, Expectation]) -> Expectation:
        if arm.k == 0:
            return 0.0, 0.0
        if arm in expected:
            drafted, accepted = expected[arm]
            return drafted, accepted * self._trust
        return float(batch * arm.k), batch * self._acceptance[arm.drafter].expected(arm.k, self._random)

    def threshold(self, batch: int) -> float:
        # The rate is highest when a row is added exactly if it emits more tokens than its time would emit otherwise.
        latency = self._latency_of(Arm(NGRAM, 1))
        plain_seconds, _ = latency.predict(PLAIN.drafter, batch, 0)
        return min(max(latency.seconds_per_row() * batch / plain_seconds, 0.05), 0.8)

    def observe(self, step: Step) -> None:
        if step.drafted:
            self._trials[bucket_of(step.batch), step.arm.drafter] += 1
            self._latency_of(step.arm).observe(step.arm.drafter, step.batch, step.drafted, step.seconds)
        else:
            for latency in self._latency.values():
                latency.observe(PLAIN.drafter, step.batch, 0, step.seconds)
        if step.tried_at and step.arm not in self._expected:  # expected drafts come with estimates of their own
            self._acceptance[step.arm.drafter].observe(step.tried_at, step.accepted_at)
        expected = self._expected.get(step.arm)
        if expected is not None and expected[1] >= 1:
            share = (step.emitted - step.batch) / expected[1]
            self._trust += (min(share, 4.0) - self._trust) / 64

    def renew(self, drafter: str) -> None:
        if drafter in self._acceptance:
            self._acceptance[drafter].renew()

    def state(self) -> dict[str, Any]:
        return {
            "latency": {name: latency.state() for name, latency in self._latency.items()},
            "acceptance": {name: acceptance.state() for name, acceptance in self._acceptance.items()},
            "trust": self._trust,
        }

    def restore(self, state: dict[str, Any]) -> None:
        for learned, own in ((state["latency"], self._latency), (state["acceptance"], self._acceptance)):
            for name in own.keys() & learned.keys():
                own[name].restore(learned[name])
        self._trust = state["trust"]
