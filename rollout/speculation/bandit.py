"""Which drafter, and how many draft tokens, in the next engine step: learned from the steps before.

A controller is told what every step cost and gave (`observe`) and asked what to do next (`choose`). It knows nothing of
engines or tensors. Terms:

- arm: a drafter and a number k of draft tokens per request. `PLAIN`, no drafts, is always among the arms.
- batch: requests that decode in the step. Choices are made per bucket of batch sizes, because verifying k more rows per
  request is nearly free for a few requests and dear for many.
- rows: what the model computes in the step, the batch plus all draft tokens.
- rate: tokens emitted per second, which every controller maximises.

`epsilon_greedy` is bucketed epsilon-greedy over a sliding window (the rule of FastRL's tuner, per bucket). `thompson`
predicts the rate of every arm from a latency model and acceptance estimates and draws both from their uncertainty
(Thompson sampling), so that it needs few trials per bucket and arm.
"""

import random
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any, Protocol

from megatron_rl.config import ConfigError
from rollout.speculation.acceptance_model import AcceptanceModel
from rollout.speculation.latency_model import LatencyModel

WINDOW = 96  # steps that a median looks back on: older ones are forgotten
SWITCH_GAIN = 1.03  # an arm replaces the current one only when it promises this much more
HOLD_STEPS = 4  # steps between decisions
TRIALS = 3  # steps with each drafter in each bucket, whatever their forecast: it is a guess before they were measured
HOPELESS = 0.1  # a drafter whose first token is accepted less often needs no trial: it would not pay if it were free

NGRAM, EAGLE = "ngram", "eagle"  # the drafters of `rollout.speculation.drafters`


@dataclass(frozen=True)
class Arm:
    """A drafter by name and the most draft tokens per request."""

    drafter: str
    k: int

    def __str__(self) -> str:
        return f"{self.drafter}:{self.k}" if self.k else "plain"


PLAIN = Arm("none", 0)


@dataclass(frozen=True)
class Step:
    """What one pure decoding step did."""

    arm: Arm
    batch: int
    drafted: int  # draft tokens verified, over all requests
    emitted: int  # tokens that came out, over all requests
    seconds: float
    tried_at: tuple[int, ...] = ()  # per draft position: requests whose earlier drafts were all accepted
    accepted_at: tuple[int, ...] = ()  # of those, how many had this draft accepted too


# What an arm would draft in the next step, and how many of those tokens it expects to be accepted.
Expectation = tuple[float, float]


class Controller(Protocol):
    """What the scheduler needs."""

    counts: Counter[tuple[int, Arm]]
    """How often each (bucket, arm) was chosen, in steps."""

    def choose(self, batch: int, expected: Mapping[Arm, Expectation]) -> Arm:
        """The arm of the next step. `expected` holds the arms whose drafter can tell what it would draft.

        Arms that would draft nothing are not worth trying.
        """

    def threshold(self, batch: int) -> float:
        """Drafts whose chance to be reached and accepted is below this cost more than they bring."""

    def knows(self, batch: int) -> bool:
        """Whether drafts were tried with about so many live requests, so that their cost is no guess."""

    def observe(self, step: Step) -> None:
        """Learn from a step."""

    def renew(self, drafter: str) -> None:
        """This drafter is another one from now on: forget how often its drafts were accepted."""

    def state(self) -> dict[str, Any]:
        """All that was learned, as plain values (JSON)."""

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `state` returned."""


def bucket_of(batch: int) -> int:
    """Batch sizes 1, 2, 3-4, 5-8, ... share a bucket, named by its largest."""
    return 1 << max(batch - 1, 0).bit_length()


def make_arms(drafters: Sequence[str], max_draft_tokens: int) -> list[Arm]:
    """`PLAIN` and, for each drafter, k = 1, 2, 4, ... up to the limit.

    Raises ConfigError for no drafter, a repeated one, or a limit below 1.
    """
    if not drafters or len(set(drafters)) < len(drafters):
        raise ConfigError(
            f"rollout.speculation.drafters={list(drafters)} must name each drafter once, and at least one."
        )
    if max_draft_tokens < 1:
        raise ConfigError(f"rollout.speculation.max_draft_tokens={max_draft_tokens} must be 1 or more.")
    sizes = [1 << power for power in range(max_draft_tokens.bit_length()) if 1 << power < max_draft_tokens]
    return [PLAIN, *(Arm(name, k) for name in drafters for k in [*sizes, max_draft_tokens])]


def make_controller(kind: str, drafters: Sequence[str], max_draft_tokens: int, seed: int = 0) -> Controller:
    """The controller of `rollout.speculation.adaptive`. Raises ConfigError, see `make_arms`."""
    if kind == "off":
        return StaticController(PLAIN)
    arms = make_arms(drafters, max_draft_tokens)
    if kind == "static":
        return StaticController(Arm(drafters[0], max_draft_tokens))
    if kind == "epsilon_greedy":
        return EpsilonGreedyController(arms, seed=seed)
    if kind == "thompson":
        return ThompsonController(arms, seed=seed)
    raise ConfigError(f"rollout.speculation.adaptive={kind!r} is not one of off, static, epsilon_greedy, thompson.")


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


class _Holding:
    """Keeps a bucket's arm for some steps and against small promised gains; counts the choices."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[int, Arm]] = Counter()
        self._current: dict[int, Arm] = {}
        self._trial = PLAIN  # the arm in use
        self._bucket, self._held = 0, 0

    def keep(self, bucket: int) -> Arm | None:
        """The arm to stay with, or None when it is time to decide."""
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

    def take(self, bucket: int, arm: Arm, for_good: bool = True) -> Arm:
        """Use an arm from now on, or only until the next decision."""
        self._held, self._trial = 0, arm
        if for_good:
            self._current[bucket] = arm
        return self._use(bucket, arm)

    def _use(self, bucket: int, arm: Arm) -> Arm:
        self._bucket, self._held = bucket, self._held + 1
        self.counts[bucket, arm] += 1
        return arm


class EpsilonGreedyController:
    """Bucketed epsilon-greedy: per bucket the arm with the highest rate of late, now and then another one.

    The rate is the mean of the tokens over the median of the seconds: a pause is an outlier, but a step that emits many
    tokens is not, and for few requests the median of the tokens hides what long drafts bring.
    """

    def __init__(self, arms: Sequence[Arm], epsilon: float = 0.03, window: int = WINDOW, seed: int = 0) -> None:
        """Raises ConfigError when `arms` lacks `PLAIN`, or for epsilon outside [0, 1]."""
        _check_arms(arms)
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
            return self._holding.take(bucket, self._random.choice(arms), for_good=False)
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


class ThompsonController:
    """Predicts each arm's rate from latency(batch, draft tokens) and the acceptance of its drafts.

    Every drafter has a latency model of its own, because making drafts costs time too; steps without drafts belong to
    all of them.
    """

    def __init__(self, arms: Sequence[Arm], seed: int = 0) -> None:
        """Raises ConfigError when `arms` lacks `PLAIN`."""
        _check_arms(arms)
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
            best = PLAIN  # forecasts are off by some percent, and plain decoding is what must not be slowed
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
        # The rate is best when a row is added exactly if it brings more tokens than its time brings otherwise.
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
        if step.tried_at and step.arm not in self._expected:  # a drafter that can tell knows better
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


def _check_arms(arms: Sequence[Arm]) -> None:
    if PLAIN not in arms:
        raise ConfigError("the arms of adaptive speculation must include plain decoding (k = 0).")
    if len(set(arms)) < len(arms):
        raise ConfigError(f"an arm of adaptive speculation is given twice: {', '.join(map(str, arms))}.")
