"""How often drafts are accepted, by their place in the draft: learned from what the engine verified."""

import random
from collections.abc import Sequence


class AcceptanceModel:
    """Per draft position, the chance that a draft is accepted after those before it were; old steps fade."""

    FADE = 0.995
    RENEWED = 2.0  # tries that the past is worth after `renew`

    def __init__(self) -> None:
        self._accepted: list[float] = []
        self._tried: list[float] = []

    def observe(self, tried: Sequence[int], accepted: Sequence[int]) -> None:
        """Count one step; both sequences are per draft position."""
        while len(self._tried) < len(tried):
            self._accepted.append(1.0)  # one success and one failure, Beta(1, 1), before anything was seen
            self._tried.append(2.0)
        for place, (tries, hits) in enumerate(zip(tried, accepted, strict=True)):
            self._accepted[place] = 1.0 + (self._accepted[place] - 1.0) * self.FADE + hits
            self._tried[place] = 2.0 + (self._tried[place] - 2.0) * self.FADE + tries

    def expected(self, k: int, draw: random.Random) -> float:
        """Expected accepted tokens of k drafts, with the chances drawn from their posterior."""
        total, reach = 0.0, 1.0
        for place in range(k):
            hits, tries = (self._accepted[place], self._tried[place]) if place < len(self._tried) else (1.0, 2.0)
            reach *= draw.betavariate(hits, tries - hits)
            total += reach
        return total

    def likely(self) -> float:
        """The chance that the first draft token is accepted."""
        return self._accepted[0] / self._tried[0] if self._tried else 0.5

    def renew(self) -> None:
        """What was seen counts no more than a guess."""
        for place, tries in enumerate(self._tried):
            weight = min(self.RENEWED / max(tries - 2.0, 1e-9), 1.0)
            self._accepted[place] = 1.0 + (self._accepted[place] - 1.0) * weight
            self._tried[place] = 2.0 + (tries - 2.0) * weight

    def state(self) -> list[list[float]]:
        return [self._accepted, self._tried]

    def restore(self, state: list[list[float]]) -> None:
        self._accepted, self._tried = list(state[0]), list(state[1])
