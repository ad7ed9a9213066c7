"""The answer that a response gives, in a normal form in which responses can be counted as votes."""

import re
from decimal import Decimal

from megatron_rl.rewards.builtin import ALONE, boxed, last_letter, last_number

TYPESETTING = (  # ways of writing that mean the same
    (re.compile(r"\\[dt]frac"), r"\\frac"),
    (re.compile(r"\\(?:text|mathrm|mathbf|textbf)\s*\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\\left|\\right|\\[,;! $%]|[$%\s]|\^\\circ|\^\{\\circ\}"), ""),
)
DECIMAL = re.compile(r"-?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)?(?:\.[0-9]+)?")


def final_answer(text: str) -> str | None:
    """The content of the last `\\boxed{...}`, else the chosen letter, else the last number; None without any of them.

    Equal forms are equal answers. The converse does not hold for all mathematics: `1/2` and `0.5` are two forms.
    """
    box = boxed(text)
    if box is not None:
        for pattern, replacement in TYPESETTING:
            box = pattern.sub(replacement, box)
        letter = ALONE.fullmatch(box)
        return letter[1] if letter else _plain(box.rstrip(".")) or None
    number = last_number(text)
    return last_letter(text) or (None if number is None else _decimal(number))


def _plain(text: str) -> str:
    """A number as `_decimal` writes it, other texts as they are."""
    if not text or text == "-" or not DECIMAL.fullmatch(text):
        return text
    return _decimal(Decimal(text.replace(",", "")))


def _decimal(number: Decimal) -> str:
    """Without zeros that mean nothing."""
    text = f"{number:f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text in ("-0", "") else text
