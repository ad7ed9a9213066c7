"""The built-in rewards: 1.0 for a right answer, 0.0 for a wrong one. Importable without torch."""

from collections.abc import Callable, Mapping

from megatron_rl.rewards.boxes import boxed
from megatron_rl.rewards.judgement import Judgement, compare
from megatron_rl.rewards.last_letter import judge_choice, last_letter
from megatron_rl.rewards.last_number import judge_numeric, last_number
from megatron_rl.rewards.math_answer import judge_math

__all__ = [
    "BUILTIN",
    "INLINE",
    "JUDGES",
    "boxed",
    "choice",
    "exact",
    "last_letter",
    "last_number",
    "length_penalty",
    "math",
    "numeric",
]

Judge = Callable[[str, str], Judgement]
"""(response, answer) -> how the response was read."""


def judge_exact(response: str, answer: str) -> Judgement:
    """Is the response the answer, but for white space around it?"""
    return compare(answer.strip(), response.strip(), "")


def exact(prompt: str, response: str, answer: str) -> float:
    """Is the response the answer, but for white space around it?"""
    return judge_exact(response, answer).score


def numeric(prompt: str, response: str, answer: str) -> float:
    """Is the last number of the response equal to the last number of the answer?

    Thousands separators, currency and percent signs, trailing zeros and the typeface of digits and of the minus do not
    matter; `1e5`, `10^{5}`, `3/4` and `\\frac{3}{4}` are one number each. A minus directly after a digit or letter is
    subtraction: the last number of `5-3` is 3.

    Raises:
        ValueError: when the answer has no number.
    """
    return judge_numeric(response, answer).score


def math(prompt: str, response: str, answer: str) -> float:
    """Is the answer of the response (in its last box that is closed and not empty, if any) mathematically equal to
    `answer`, by math-verify?

    `answer` may be plain (`1/2`), LaTeX with or without dollars, several answers, boxed, or end in GSM8K's `#### 72`.

    Raises:
        ValueError: when the answer cannot be parsed.
    """
    return judge_math(response, answer).score


def choice(prompt: str, response: str, answer: str) -> float:
    """Is the chosen letter (see `last_letter`) the answer's?

    Raises:
        ValueError: when the answer is not a letter.
    """
    return judge_choice(response, answer).score


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


BUILTIN: Mapping[str, Callable[[str, str, str], float]] = {
    "exact": exact,
    "numeric": numeric,
    "math": math,
    "choice": choice,
}
JUDGES: Mapping[str, Judge] = {
    "exact": judge_exact,
    "numeric": judge_numeric,
    "math": judge_math,
    "choice": judge_choice,
}
INLINE = ("exact", "numeric", "choice")
"""These take microseconds and cannot hang: they run in the calling process."""
