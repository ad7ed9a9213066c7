"""How a built-in reward read a response."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Judgement:
    """A score, and what it was given for."""

    score: float
    """1.0 for a right answer, else 0.0."""
    expected: str
    """The reference answer as it was read."""
    found: str | None
    """The final answer that was read from the response; None when it has none."""
    why: str
    """A few words."""


def compare(expected: str, found: str | None, missing: str) -> Judgement:
    """Of two readings that are equal when they are equal texts; `missing` says what the response lacks."""
    if found is None:
        return Judgement(0.0, expected, None, missing)
    equal = found == expected
    return Judgement(float(equal), expected, found, "equal" if equal else "different")
