"""The engine step under way: what was scheduled, and what verification made of it."""

from collections import Counter
from dataclasses import dataclass, field, replace

from rollout.speculation.arms import EAGLE, Arm, Step
from rollout.types import HISTORY, SpeculationCounts


@dataclass
class StepInFlight:
    """One step, from its schedule until the next one begins."""

    arm: Arm
    started: float
    """In seconds, by `time.perf_counter`."""
    batch: int
    """Requests in the step."""
    drafts: dict[str, int]
    """Request id -> draft tokens."""
    pure: bool
    """Every request decodes: no prompt is computed."""
    from_history: dict[str, str]
    """Request id -> drafter, for requests that draft from earlier responses."""
    accepted_by: Counter[str] = field(default_factory=Counter)
    """Drafter -> draft tokens accepted."""
    tried_at: list[int] = field(default_factory=list)
    """See `Step.tried_at`."""
    accepted_at: list[int] = field(default_factory=list)
    """See `Step.accepted_at`."""
    emitted: int = 0
    """Tokens, known when the step is over."""

    def record_verified(self, request_id: str, accepted: int) -> None:
        """Note how many of a request's draft tokens were accepted."""
        drafter = self.from_history.get(request_id, self.arm.drafter)
        self.accepted_by[drafter] += accepted
        if drafter != self.arm.drafter:
            return
        for position in range(min(accepted + 1, self.drafts.get(request_id, 0))):
            if position == len(self.tried_at):
                self.tried_at.append(0)
                self.accepted_at.append(0)
            self.tried_at[position] += 1
            self.accepted_at[position] += position < accepted

    @property
    def drafted(self) -> int:
        """Draft tokens over all requests."""
        return sum(self.drafts.values())

    @property
    def is_typical(self) -> bool:
        """Whether the step's time says what steps with as many drafts cost.

        A step in which the head only drafts for the next one costs more than a plain one.
        """
        primes = self.arm.drafter == EAGLE and not self.drafted
        return self.pure and self.emitted > 0 and not primes

    def observation(self, seconds: float) -> Step:
        """The step as the controller observes it; n-gram drafts come with acceptance estimates of their own."""
        step = Step(self.arm, self.batch, self.drafted, self.emitted, seconds)
        if self.arm.drafter != EAGLE:
            return step
        return replace(step, tried_at=tuple(self.tried_at), accepted_at=tuple(self.accepted_at))

    def add_to(self, counts: SpeculationCounts, seconds: float, saved: float) -> None:
        """Add the step to an engine's counts.

        Args:
            counts: changed in place.
            seconds: duration of the step.
            saved: seconds that its drafts saved, negative if they cost more.
        """
        drafted, accepted = self.drafted, self.accepted_by.total()
        counts.steps += 1
        counts.verifications += self.batch
        counts.drafted += drafted
        counts.accepted += accepted
        counts.emitted += self.emitted
        counts.seconds += seconds
        if drafted:
            drafted_by = self._drafted_by()
            counts.drafted_by += drafted_by
            counts.accepted_by += self.accepted_by
            for drafter, tokens in drafted_by.items():
                share = self.accepted_by[drafter] / accepted if accepted else tokens / drafted
                counts.saved_by[drafter] += saved * share
            counts.history_seconds += seconds * drafted_by[HISTORY] / (self.batch + drafted)
        if self.arm.drafter == EAGLE:
            counts.tried_at.update(dict(enumerate(self.tried_at)))
            counts.accepted_at.update(dict(enumerate(self.accepted_at)))

    def _drafted_by(self) -> Counter[str]:
        """Drafter -> draft tokens."""
        drafted: Counter[str] = Counter()
        for request_id, count in self.drafts.items():
            drafted[self.from_history.get(request_id, self.arm.drafter)] += count
        return drafted
