"""The answer that a response gives, in a normal form in which responses can be counted as votes."""

import re

from megatron_rl.rewards.boxes import boxed, without_boxes
from megatron_rl.rewards.last_letter import last_letter
from megatron_rl.rewards.last_number import last_number, number_text
from megatron_rl.rewards.math_text import announced, answers, number, plain_latex

TYPESETTING = (  # ways of writing that mean the same
    (re.compile(r"\\[dtc]frac"), r"\\frac"),
    (re.compile(r"\\(?:text\w*|mathrm|mathbf|mathit|mbox)\s*\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\\left(?![a-z])|\\right(?![a-z])|\\(?=%)|\\[,;:! ]|~|\^\\circ|\^\{\\circ\}"), ""),
)
_WORD = re.compile(r"(?<![\\A-Za-z{])(?!and\b|or\b)[A-Za-z]{2,}")
_LETTER = re.compile(r"\**[(\[]?([A-Z])[)\]]?[.:]?\**|[(\[]([A-Z])[)\]].*|([A-Z])[).:]\s.*", re.DOTALL)


def final_answer(text: str, reward: str | None = None) -> str | None:
    """The answer of a response as `reward` reads it; None when it gives none.

    Equal forms are equal answers: a reward scores them alike. The converse does not hold for all mathematics: `1/2` and
    `0.5` are two forms.

    Args:
        text: the response.
        reward: a built-in reward. None stands for a function of the user's, which may read anything: then, as for
            `math`, it is the content of the last box, else the chosen letter, else the last number.
    """
    if reward == "exact":
        return text.strip()
    if reward == "choice":
        return last_letter(text)
    if reward == "numeric":
        return _last_number(text)
    box = boxed(text)
    if box is None:
        text = without_boxes(text)
        phrase = announced(text)
        box = None if phrase is None or _WORD.search(plain_latex(phrase)) else phrase
    if box is None:
        return last_letter(text) or _last_number(text)
    letter = _LETTER.fullmatch(_typeset(box, spaces=True))
    if letter:
        return next(group for group in letter.groups() if group)
    return ",".join(map(_normal, answers(plain_latex(box)))) or None


def _last_number(text: str) -> str | None:
    found = last_number(text)
    return None if found is None else number_text(found)


def _normal(answer: str) -> str:
    """One answer; a number without zeros that mean nothing."""
    value = number(_typeset(answer, spaces=True))
    return _typeset(answer).rstrip(".") if value is None else number_text(value)


def _typeset(text: str, spaces: bool = False) -> str:
    """In one way of writing; with the `spaces` between words or without any."""
    for pattern, replacement in TYPESETTING:
        text = pattern.sub(replacement, text)
    return text.strip() if spaces else re.sub(r"\s", "", text)
