"""The reward `math`: answers compared as mathematics, by math-verify."""

import logging
import re
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from typing import Any

from megatron_rl.rewards.boxes import boxed, without_boxes
from megatron_rl.rewards.judgement import Judgement
from megatron_rl.rewards.math_text import (
    announced,
    answers,
    equal_numbers,
    for_math_verify,
    links,
    number,
    percent,
    plain_latex,
)

TINY = 1e-4
"""math-verify rounds to six decimals, which is all that numbers below this have."""


_TYPESET_SEPARATOR = re.compile(r"(?<=[0-9])(?:\{,\}|,?\\[,!;: ])(?=[0-9]{3}(?![0-9]))")
"""Of thousands, as LaTeX writes them; math-verify knows the plain comma alone."""


@dataclass(frozen=True)
class Reading:
    """An answer as it was read."""

    text: str
    """In one way of writing."""
    values: list[Any]
    """What math-verify makes of it, one per answer, in its order."""


@dataclass(frozen=True)
class Percent:
    """A number with a percent sign, which says the same as the number and as a hundredth of it."""

    value: Decimal


def judge_math(response: str, answer: str) -> Judgement:
    """Is the answer of the response mathematically equal to `answer`?

    Raises:
        ValueError: when math-verify cannot read `answer`.
    """
    gold = read_reference(answer)
    box = boxed(response)
    if box is not None:
        return _judge(gold, plain_latex(box))
    text = _TYPESET_SEPARATOR.sub("", without_boxes(response))
    phrase = announced(text)
    if phrase is not None and (judgement := _judge(gold, plain_latex(phrase))).score:
        return judgement
    value, found = _chosen(text)
    if value is None:
        return Judgement(0.0, gold.text, found, "no answer that math-verify can read")
    right = _same_answers(gold.values, _members([value]))
    return Judgement(float(right), gold.text, found, f"{'equal' if right else 'different'}; without a box")


@lru_cache(maxsize=256)  # the responses to a prompt are scored one after the other
def read_reference(answer: str) -> Reading:
    """A reference answer: its last box, or what follows `####`, or all of it. It is LaTeX, with delimiters or without.

    Raises:
        ValueError: when math-verify cannot read it.
    """
    box = boxed(answer)
    text = plain_latex(box if box is not None else answer.rpartition("####")[2])
    values = _values(text)
    if not values:
        raise ValueError(f"the reference answer {answer!r} cannot be parsed")
    return Reading(text, values)


def _judge(gold: Reading, text: str) -> Judgement:
    if _compact(text) == _compact(gold.text):
        return Judgement(1.0, gold.text, text, "the same text")
    values = _values(text)
    if not values:
        return Judgement(0.0, gold.text, text, "math-verify cannot read it")
    right = _same_answers(gold.values, values)
    return Judgement(float(right), gold.text, text, "equal" if right else "different")


def _values(text: str) -> list[Any]:
    """What math-verify makes of each answer of a text; an empty list when it cannot read all of them."""
    parts = answers(text)
    values = [value for part in parts for value in _read(part)]
    if None in values:
        whole = _parse_latex(text) if len(parts) > 1 else None
        values = [] if whole is None else [whole]
    return _members(values)


def _read(part: str) -> list[Any]:
    """The values of one answer, of which a plus-minus has two; [None] when math-verify cannot read it."""
    if (exact := number(part)) is not None:
        return [exact]
    if (share := percent(part)) is not None:
        return [Percent(share)]
    if chain := links(part):
        return [_parse_latex(link) for link in chain]
    value = _parse_latex(part)
    return _members([value]) if "\\pm" in part else [value]


def _parse_latex(text: str) -> Any:
    from math_verify import LatexExtractionConfig, parse

    _quiet()
    found = parse(f"${for_math_verify(text)}$", [LatexExtractionConfig()], parsing_timeout=None)
    return next((value for value in found if not isinstance(value, str)), None)


def _chosen(text: str) -> tuple[Any, str | None]:
    """What math-verify takes for the answer of a text without a box: value and text, None where there is none."""
    from math_verify import parse

    _quiet()
    found = parse(text, parsing_timeout=None)
    value = next((value for value in found if not isinstance(value, str)), None)
    return value, next((value for value in found if isinstance(value, str)), None if value is None else str(value))


def _quiet() -> None:
    # Our time limit ends a hanging call by ending its process; math-verify warns that its own alarm is off.
    logging.getLogger("math_verify").setLevel(logging.ERROR)


def _members(values: list[Any]) -> list[Any]:
    """A set is the list of what is in it."""
    from sympy import FiniteSet

    if len(values) == 1 and isinstance(values[0], FiniteSet) and values[0].args:
        return list(values[0].args)
    return values


def _same_answers(gold: list[Any], found: list[Any]) -> bool:
    """Whether these are the same answers, in any order; in order where they are a point's coordinates."""
    if len(gold) == 1 < len(found) and len(coordinates := _coordinates(gold[0])) == len(found):
        return all(map(_equal, coordinates, found))
    if len(found) == 1 < len(gold):
        found = _coordinates(found[0])
    if len(gold) == 1 and (solutions := _solutions(found)) is not None and _verify(gold[0], solutions):
        return True
    if len(gold) != len(found):
        return False
    left = list(found)
    for each in gold:
        place = next((place for place, other in enumerate(left) if _equal(each, other)), None)
        if place is None:
            return False
        del left[place]
    return True


def _coordinates(value: Any) -> list[Any]:
    """Of a point; `(1, 2)` may also be read as an open interval."""
    from sympy import Interval, Tuple

    if isinstance(value, Interval) and value.left_open and value.right_open:
        return [value.start, value.end]
    return list(value) if isinstance(value, Tuple) else []


def _solutions(relations: list[Any]) -> Any:
    """The numbers for which one of several relations holds, as a set; None for other values."""
    from sympy import Union
    from sympy.logic.boolalg import Boolean

    if not all(isinstance(relation, Boolean) for relation in relations):
        return None
    try:
        return Union(*[relation.as_set() for relation in relations])
    except Exception:  # of several variables, or what sympy cannot solve
        return None


def _verify(gold: Any, found: Any) -> bool:
    from math_verify import verify

    return bool(verify(gold, found, timeout_seconds=None))


def _equal(gold: Any, found: Any) -> bool:
    if isinstance(gold, Percent) and isinstance(found, Percent):
        return _equal(gold.value, found.value)
    if isinstance(gold, Percent):
        return _equal(gold.value, found) or _equal(gold.value / 100, found)
    if isinstance(found, Percent):
        return _equal(gold, found.value) or _equal(gold, found.value / 100)
    if isinstance(gold, Decimal) and isinstance(found, Decimal):
        return equal_numbers(gold, found)
    gold, found = _as_sympy(gold), _as_sympy(found)
    if not _verify(gold, found):
        return False
    size = _size(gold)
    if size is None or not 0 < abs(size) < TINY:
        return True
    other = _size(found)
    return other is not None and abs(size - other) <= 1e-6 * abs(size)


def _as_sympy(value: Any) -> Any:
    """Decimals become floats, which math-verify compares to six decimals."""
    from sympy import Float, Integer

    if not isinstance(value, Decimal):
        return value
    exact = Fraction(value)
    return Integer(exact.numerator) if exact.denominator == 1 else Float(value)


def _size(value: Any) -> complex | None:
    """The number that a value of sympy is, or None."""
    try:
        return complex(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _compact(text: str) -> str:
    return re.sub(r"\s+", "", text)
