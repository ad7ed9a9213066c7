"""The reward `numeric`: the last number of a text."""

import re
from collections import deque
from decimal import Decimal
from fractions import Fraction

from megatron_rl.rewards.characters import in_ascii
from megatron_rl.rewards.judgement import Judgement, compare

Number = Decimal | Fraction
"""A Fraction, of integers below 10^9, only where the text has one; both compare exactly with each other."""

_INTEGER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
_EXPONENT = r"\{?\s*(?P<NAME>[+-]?[0-9]{1,4})(?![0-9])"
_NUMBER = re.compile(
    # Not inside a word or number, where a minus is subtraction and a period ends a sentence.
    r"(?:(?<![0-9.\w)])(?P<sign>-?)(?:\\?\$|[\u00a3\u00a5\u20ac\u20b9])?(?=\.?[0-9]|\\[dtc]?frac))?(?:"
    r"(?:(?P<whole>[0-9]{1,9})\s*)?\\[dtc]?frac\s*\{\s*(?P<minus>-?)(?P<above>[0-9]{1,9})\s*\}\s*\{\s*(?P<below>[0-9]{1,9})\s*\}"
    r"|(?:(?P<mixed>[0-9]{1,9})[ ]+)?(?P<over>[0-9]{1,9})[ ]?/[ ]?(?P<under>[0-9]{1,9})(?![0-9]|[.,]?[0-9]|[ ]?/)"
    r"|10(?:\^|\*\*)" + _EXPONENT.replace("NAME", "ten") + "|"
    rf"(?P<digits>{_INTEGER}(?:\.[0-9]+)?|(?<![0-9.\w)])\.[0-9]+|(?<=[-$])\.[0-9]+)"
    r"(?:[eE](?P<e>[+-]?[0-9]{1,4})(?!\w|\.[0-9])"
    r"|\s*(?:\\times|\\cdot|\*|x|\u00b7)\s*10\s*(?:\^|\*\*)\s*" + _EXPONENT.replace("NAME", "power") + ")?)"
)
_POWER_OF_TEN = re.compile("(?<=10)[\u207b\u207a]?[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+")
_SUPERSCRIPTS = str.maketrans(
    "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207b\u207a", "0123456789-+"
)
_REACH = 200
"""Characters: so far before its end a number starts, if there is a space in between."""
_AFTER_CARET = re.compile(r"\^\s*\{?\s*$")


def last_number(text: str) -> Number | None:
    """The last number in `text`, or None.

    Read as one number: thousands separators, scientific notation (`1e5`, `1.5 \\times 10^{-3}`), fractions of integers
    (`3/4`, `\\frac{3}{4}`, `2 1/2`), signs and digits of other typefaces. An exponent, as of `m^2`, is no number of its
    own. Currency and percent signs do not matter.
    """
    if text.isascii():
        text = _end(text)  # most of a long response need not be read
    text = in_ascii(text)
    if not text.isascii():
        text = _POWER_OF_TEN.sub(lambda power: f"^{{{power[0].translate(_SUPERSCRIPTS)}}}", text)
    last: re.Match[str] | None = None
    for found in deque(_NUMBER.finditer(text), maxlen=4):
        if last is None or not _AFTER_CARET.search(text, max(found.start() - 4, 0), found.start()):
            last = found
    return None if last is None else _value(last, text)


def _end(text: str) -> str:
    """`text` from a space on that is well before the last digit."""
    before = max(map(text.rfind, "0123456789")) - _REACH
    return text[max(text.rfind(" ", 0, before), text.rfind("\n", 0, before)) + 1 :] if before > 0 else text


def _value(found: re.Match[str], text: str) -> Number:
    value: Number
    if found["ten"]:
        value = Decimal(f"1e{found['ten']}")
    elif found["digits"]:
        value = Decimal(f"{found['digits'].replace(',', '')}e{found['e'] or found['power'] or 0}")
    else:
        above, below = int(found["above"] or found["over"]), int(found["below"] or found["under"])
        whole = found["whole"] or found["mixed"]
        # A date such as 3/4/2024, a division by zero, and `3 7/2`, which are two numbers.
        if below == 0 or text[: found.start()].rstrip().endswith("/"):
            return Decimal(below)
        value = Fraction(above, below) + (int(whole) if whole and above < below else 0)
        if found["minus"]:
            value = -value
    negative = (found["sign"] or "") == "-"
    if not negative:
        return value
    return value.copy_negate() if isinstance(value, Decimal) else -value


def number_text(number: Number) -> str:
    """A number in one form: without zeros that mean nothing, an endless decimal as a fraction."""
    if isinstance(number, Fraction):
        decimal = Decimal(number.numerator) / Decimal(number.denominator)
        if decimal != number:
            return str(number)
        number = decimal
    text = f"{number:f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text in ("-0", "") else text


def judge_numeric(response: str, answer: str) -> Judgement:
    """Is the last number of the response equal to the last number of the answer?

    Raises:
        ValueError: when the answer has no number.
    """
    expected = last_number(answer)
    if expected is None:
        raise ValueError(f"the reference answer {answer!r} has no number")
    found = last_number(response)
    return compare(number_text(expected), None if found is None else number_text(found), "no number")
