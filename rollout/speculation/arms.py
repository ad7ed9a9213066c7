"""The terms of adaptive drafting, and what a controller is.

- arm: a drafter and a number k of draft tokens per request. `PLAIN`, no drafts, is always among the arms.
- batch: requests that decode in the step. Choices are made per bucket of batch sizes, because verifying k more rows per
  request is nearly free for a few requests and expensive for many.
- rows: what the model computes in the step, the batch plus all draft tokens.
- rate: tokens emitted per second, which every controller maximises.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_rl.config import ConfigError

SWITCH_GAIN = 1.03
"""An arm replaces the current one only when its predicted rate is this many times higher."""

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
    """Requests."""
    drafted: int
    """Draft tokens verified, over all requests."""
    emitted: int
    """Tokens emitted, over all requests."""
    seconds: float
    tried_at: tuple[int, ...] = ()
    """Per draft position: requests whose earlier draft tokens were all accepted."""
    accepted_at: tuple[int, ...] = ()
    """Of those, how many had the token at this position accepted too."""


Expectation = tuple[float, float]
"""How many tokens an arm would draft in the next step, and how many of them it expects to be accepted."""


class Controller(Protocol):
    """What the scheduler needs."""

    counts: Counter[tuple[int, Arm]]
    """How often each (bucket, arm) was chosen, in steps."""

    def choose(self, batch: int, expected: Mapping[Arm, Expectation]) -> Arm:
        """The arm of the next step.

        Args:
            batch: requests that decode in it.
            expected: for the arms whose drafts are known already, what they would draft; an arm that would draft
                nothing is not tried.
        """

    def threshold(self, batch: int) -> float:
        """Draft tokens that are accepted with a lower probability than this cost more time than they save."""

    def knows(self, batch: int) -> bool:
        """Whether drafts were measured at about this batch size, so that their cost is known."""

    def observe(self, step: Step) -> None:
        """Learn from a step."""

    def renew(self, drafter: str) -> None:
        """The drafter has new weights: forget how often its drafts were accepted."""

    def state(self) -> dict[str, Any]:
        """All that was learned, as plain values (JSON)."""

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned."""


def bucket_of(batch: int) -> int:
    """Batch sizes 1, 2, 3-4, 5-8, ... share a bucket, named by its largest."""
    return 1 << max(batch - 1, 0).bit_length()


def make_arms(drafters: Sequence[str], max_draft_tokens: int) -> list[Arm]:
    """`PLAIN` and, for each drafter, k = 1, 2, 4, ... up to the limit.

    Raises:
        ConfigError: for no drafter, a repeated one, or a limit below 1.
    """
    if not drafters or len(set(drafters)) < len(drafters):
        raise ConfigError(
            f"rollout.speculation.drafters={list(drafters)} must name each drafter once, and at least one."
        )
    if max_draft_tokens < 1:
        raise ConfigError(f"rollout.speculation.max_draft_tokens={max_draft_tokens} must be 1 or more.")
    sizes = [1 << power for power in range(max_draft_tokens.bit_length()) if 1 << power < max_draft_tokens]
    return [PLAIN, *(Arm(name, k) for name in drafters for k in [*sizes, max_draft_tokens])]


def check_arms(arms: Sequence[Arm]) -> None:
    """Check the arms of a controller.

    Raises:
        ConfigError: when they lack `PLAIN` or repeat an arm.
    """
    if PLAIN not in arms:
        raise ConfigError("the arms of adaptive speculation must include plain decoding (k = 0).")
    if len(set(arms)) < len(arms):
        raise ConfigError(f"an arm of adaptive speculation is given twice: {', '.join(map(str, arms))}.")
