"""The built-in rewards: 1.0 for a right answer, 0.0 for a wrong one. Importable without torch."""

import logging
import re
from collections import deque
from decimal import Decimal

NUMBER = re.compile(
    r"(?<![0-9.\w)])"  # not inside a word or number
    r"(?P<sign>-?\$?)"
    r"(?P<digits>[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
    r"|(?P<bare>[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?)"  # after a word: "x3", "5-3"
)
BOX = "\\boxed{"
LETTER = re.compile(r"(?<![A-Za-z\\])[A-J](?![A-Za-z])")
ANNOUNCED = re.compile(r"(?i:answer)\s*(?:is)?:?\s*\**\(?([A-J])(?![A-Za-z])")
ALONE = re.compile(r"\s*\**\(?([A-J])\)?[.:]?\**\s*")


def exact(prompt: str, response: str, answer: str) -> float:
    """Is the response the answer, but for white space around it?"""
    return float(response.strip() == answer.strip())


def numeric(prompt: str, response: str, answer: str) -> float:
    """Is the last number of the response equal to the last number of the answer?

    Thousands separators, `$`, a typographic minus and trailing zeros do not matter. A minus directly after a digit or
    letter is subtraction: the last number of `5-3` is 3.

    Raises:
        ValueError: when the answer has no number.
    """
    expected = last_number(answer)
    if expected is None:
        raise ValueError(f"the reference answer {answer!r} has no number")
    return float(last_number(response) == expected)


def last_number(text: str) -> Decimal | None:
    """The last number in `text`, or None."""
    found = deque(NUMBER.finditer(text.replace("\N{MINUS SIGN}", "-")), maxlen=1)
    if not found:
        return None
    last = found[0]
    value = Decimal((last["digits"] or last["bare"]).replace(",", ""))
    return -value if (last["sign"] or "").startswith("-") else value


def math(prompt: str, response: str, answer: str) -> float:
    """Is the answer of the response (the last boxed one, if any) mathematically equal to `answer`, by math-verify?

    `answer` may be plain (`1/2`), LaTeX with or without `$`, boxed, or end in GSM8K's `#### 72`.

    Raises:
        ValueError: when the answer cannot be parsed.
    """
    from math_verify import parse, verify

    # Our time limit ends a hanging call by ending its process; math-verify warns that its own alarm is off.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    delimited = "\\boxed" in answer or "$" in answer
    reference = answer if delimited else f"${answer.rpartition('####')[2].strip()}$"
    gold = parse(reference, parsing_timeout=None, raise_on_error=True)
    if not gold:
        raise ValueError(f"the reference answer {answer!r} cannot be parsed")
    # math-verify would take several boxes for a set of answers.
    final = response[max(response.rfind("\\boxed"), 0) :]
    return float(verify(gold, parse(final, parsing_timeout=None), timeout_seconds=None))


def boxed(text: str) -> str | None:
    """The content of the last `\\boxed{...}` in `text`, or None without one that is closed."""
    start = text.rfind(BOX)
    if start < 0:
        return None
    depth = 1
    for place in range(start + len(BOX), len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start + len(BOX) : place]
    return None


def last_letter(text: str) -> str | None:
    """The letter A to J that a text chooses: the last one in its last box, else the one after the last `answer is` or
    `answer:`, else the text itself. None when it chooses none."""
    box = boxed(text)
    if box is not None:
        letters = LETTER.findall(box)
        return letters[-1] if letters else None
    announced = ANNOUNCED.findall(text)
    if announced:
        return str(announced[-1])
    alone = ALONE.fullmatch(text)
    return alone[1] if alone else None


def choice(prompt: str, response: str, answer: str) -> float:
    """Is the chosen letter (see `last_letter`) the answer's?

    Raises:
        ValueError: when the answer is not one letter.
    """
    expected = last_letter(answer)
    if expected is None:
        raise ValueError(f"the reference answer {answer!r} is not a letter")
    return float(last_letter(response) == expected)


def length_penalty(length: int, start: int, coef: float, max_tokens: int) -> float:
    """0 up to `start` tokens, then linearly down to `-coef` at `max_tokens` (DAPO, arXiv 2503.14476, equation 13).

    Args:
        length: response length in tokens.
        start: length from which the penalty grows, < max_tokens.
        coef: size of the penalty at `max_tokens`.
        max_tokens: longest response.
    """
    excess = min(max(length - start, 0), max_tokens - start)
    return -coef * excess / (max_tokens - start)


BUILTIN = {"exact": exact, "numeric": numeric, "math": math, "choice": choice}
INLINE = ("exact", "numeric", "choice")
"""These take microseconds and cannot hang: they run in the calling process."""
