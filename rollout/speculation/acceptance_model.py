"""How often draft tokens are accepted, by their position in the draft: learned from what the engine verified."""

import random
from collections.abc import Sequence


class AcceptanceModel:
    """Per draft position, the probability that its token is accepted after all before it were; old steps fade."""

    FADE = 0.995
    """Weight of a step relative to the step after it."""
    RENEWED = 2.0
    """Tries that the earlier observations count for after `renew`."""

    def __init__(self) -> None:
        self._accepted: list[float] = []
        self._tried: list[float] = []

    def observe(self, tried: Sequence[int], accepted: Sequence[int]) -> None:
        """Count one step.

        Args:
            tried: per draft position, the draft tokens that were tested there.
            accepted: per draft position, how many of those were accepted.
        """
        while len(self._tried) < len(tried):
            self._accepted.append(1.0)  # the prior: one success and one failure, Beta(1, 1)
            self._tried.append(2.0)
        for position, (tries, hits) in enumerate(zip(tried, accepted, strict=True)):
            self._accepted[position] = 1.0 + (self._accepted[position] - 1.0) * self.FADE + hits
            self._tried[position] = 2.0 + (self._tried[position] - 2.0) * self.FADE + tries

    def expected(self, k: int, draw: random.Random) -> float:
        """Expected accepted tokens of a draft of k, with the probabilities drawn from their posterior."""
        total, reach = 0.0, 1.0
        for position in range(k):
            known = position < len(self._tried)
            hits, tries = (self._accepted[position], self._tried[position]) if known else (1.0, 2.0)
            reach *= draw.betavariate(hits, tries - hits)
            total += reach
        return total

    def likely(self) -> float:
        """The probability that the first draft token is accepted."""
        return self._accepted[0] / self._tried[0] if self._tried else 0.5

    def renew(self) -> None:
        """Reduce the earlier observations to little more than a prior."""
        for position, tries in enumerate(self._tried):
            weight = min(self.RENEWED / max(tries - 2.0, 1e-9), 1.0)
            self._accepted[position] = 1.0 + (self._accepted[position] - 1.0) * weight
            self._tried[position] = 2.0 + (tries - 2.0) * weight

    def state(self) -> list[list[float]]:
        """Accepted and tried tokens per draft position, as plain values (JSON)."""
        return [self._accepted, self._tried]

    def restore(self, state: list[list[float]]) -> None:
        """Continue from what `state` returned."""
        self._accepted, self._tried = list(state[0]), list(state[1])
