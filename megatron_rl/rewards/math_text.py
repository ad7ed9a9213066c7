"""Mathematical answers as they are written, in one way of writing: LaTeX without delimiters, one text per answer."""

import re
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction

from megatron_rl.rewards.characters import in_ascii

_UNICODE = str.maketrans(
    {
        "\N{GREEK SMALL LETTER PI}": r"\pi ",
        "\N{GREEK SMALL LETTER THETA}": r"\theta ",
        "\N{GREEK SMALL LETTER ALPHA}": r"\alpha ",
        "\N{GREEK SMALL LETTER BETA}": r"\beta ",
        "\N{GREEK SMALL LETTER LAMDA}": r"\lambda ",
        "\N{INFINITY}": r"\infty ",
        "\N{LESS-THAN OR EQUAL TO}": r"\le ",
        "\N{GREATER-THAN OR EQUAL TO}": r"\ge ",
        "\N{NOT EQUAL TO}": r"\ne ",
        "\N{UNION}": r"\cup ",
        "\N{INTERSECTION}": r"\cap ",
        "\N{ELEMENT OF}": r"\in ",
        "\N{PLUS-MINUS SIGN}": r"\pm ",
        "\N{MIDDLE DOT}": r"\cdot ",
        "\N{DOT OPERATOR}": r"\cdot ",
        "\N{DIVISION SIGN}": r"\div ",
        "\N{DEGREE SIGN}": r"^\circ ",
        "\N{VULGAR FRACTION ONE HALF}": r"\frac{1}{2}",
        "\N{VULGAR FRACTION ONE QUARTER}": r"\frac{1}{4}",
        "\N{VULGAR FRACTION THREE QUARTERS}": r"\frac{3}{4}",
    }
)
_SUPERSCRIPT = re.compile("[\u207b\u207a]?[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+")
_SUPERSCRIPTS = str.maketrans(
    "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207b\u207a", "0123456789-+"
)
_ROOT = re.compile(r"\N{SQUARE ROOT}\s*(?:\(([^()]*)\)|([0-9]+|[A-Za-z]))")
_LIST_COMMA = re.compile(r"(?<!\\)\$\s*(,|;|and\b|or\b)|([,;]|\band|\bor)\s*(?<!\\)\$")  # it parts two answers
_DELIMITER = re.compile(r"\\[()\[\]](?![a-zA-Z])|\\?\$|\\displaystyle(?![a-zA-Z])")
_SPACE = re.compile(r"(?<!\\)\\[,;:!> ]|~|\\q?quad(?![a-zA-Z])|\s+")
_SCIENTIFIC = re.compile(r"(?<![\w.\\])([0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE]\{?([+-]?[0-9]{1,4})\}?(?!\w|\.[0-9]|\^)")
_UNIT_POWER = re.compile(  # without a power math-verify leaves units out itself; `m` may be a variable
    r"(?<=[0-9}])\s*(?:mm|cm|dm|km|ft|yd|inch|inches|foot|feet|yards?|miles?|met(?:er|re)s?|units?)\s*\^\s*\{?\s*[23]\s*\}?$"
)
_UNIT_LETTER = re.compile(r"[0-9] [msghl]$")  # as people write metres, seconds, grams, hours and litres
_LAST_LETTER = re.compile(r"((?:^|[^A-Za-z\\])(?:a(?=b$)|b(?=c$)|s(?=t$)|m(?=p$)|m(?=t$)|l(?=t$))?)([a-hj-zA-Z])$")
_SET_BUILDER = re.compile(r"^\\\{\s*[a-zA-Z]\s*(?:\\mid(?![a-z])|\||:)(.*)\\\}$")
_MIXED = re.compile(r"(?<![\w.}^])([0-9]+) +([0-9]+)/([0-9]+)(?![\w.])")
_REPEATING = re.compile(r"(?<![\w.])([0-9]*)\.([0-9]{0,9})\\(?:overline|bar|dot)\s*\{([0-9]{1,9})\}")
_CONDITION = re.compile(r"[,;]?\s*(?:\\(?:text\w*|mathrm)\s*\{\s*)?,?\s*\bwhere\b.*$", re.DOTALL)
# What math-verify takes for something else, or cannot read, and what it reads.
_RENAMED: tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...] = (
    (re.compile(r"(?<![\w.])(?:np|math)\."), ""),
    (
        re.compile(
            r"(?<![A-Za-z\\])(arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|ln|log|exp)(?=\s*[(\\0-9])"
        ),
        r"\\\1",
    ),
    (re.compile(r"(?<![A-Za-z\\{])pi(?![A-Za-z])"), r"\\pi "),
    (re.compile(r"\*\*"), "^"),
    (re.compile(r"(?<=\\[lg])eqslant(?![a-z])"), "e"),
    (re.compile(r"\{:\}"), ":"),
    *(
        (re.compile(rf"(?<=[0-9])\s*(?:\\text\w*\s*\{{\s*)?{word}s?\b(?:\s*\}})?"), rf" \\times 10^{{{power}}}")
        for word, power in (("thousand", 3), ("million", 6), ("billion", 9), ("trillion", 12))
    ),
    (re.compile(r"\\log\s*_\s*(?:e|\{\s*e\s*\})(?![a-z])"), r"\\ln"),
    (re.compile(r"\\hbar(?![a-z])"), "h_{bar}"),
    (re.compile(r"(?<=[0-9])\.(?![0-9])"), ""),
    (re.compile(r"(?<![A-Za-z\\{])E(?=_)|(?<=[{])E(?=_)"), r"\\varepsilon"),
    (re.compile(r"(?<![A-Za-z\\{])e(?=_)"), r"\\epsilon"),
    (
        re.compile(r"_\s*(?:\{\s*\\([a-z]+)\s*\}|\\(odot|max|min|star|ast)(?![a-z]))"),
        lambda sub: f"_{{{sub[1] or sub[2]}}}",
    ),
)
_THOUSANDS = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])")
_AND = re.compile(r"\\(?:text\w*|mathrm|mbox)\s*\{\s*,?\s*(?:and|or)\s*\}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])")
_ANNOUNCED = re.compile(r"(?i)\banswers?\b[^.:\n]{0,40}?(?:\b(?:is|are)\b|:)\s*:?\s*([^\n]+)")
_SENTENCE_END = re.compile(r"[.!?]?\s*$|[.!?]\s")
_RELATION = re.compile(r"(<|>|=|\\leq?(?![a-z])|\\geq?(?![a-z]))")
_NUMBER = re.compile(
    r"(?P<sign>[+-]?)\s*(?P<digits>[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
    r"(?:\s*(?:\\times|\\cdot|\*)\s*10\s*\^\s*(?:\{\s*(?P<power>[+-]?[0-9]{1,4})\s*\}|(?P<digit>[0-9])))?"
)


def for_math_verify(text: str) -> str:
    """`text` so that math-verify does not take its last letter for a unit: it reads `2c` and `3ab` as 2 and 3."""
    return text if _UNIT_LETTER.search(text) else _LAST_LETTER.sub(r"\1{\2}", text)


def plain_latex(text: str) -> str:
    """An answer in LaTeX without what does not change it: delimiters, currency, spaces for looks, separators of
    thousands, other ways to type a character, `e` for a power of ten."""
    text = in_ascii(text)
    if not text.isascii():
        text = _ROOT.sub(lambda root: rf"\sqrt{{{root[1] or root[2]}}}", text.translate(_UNICODE))
        text = _SUPERSCRIPT.sub(lambda power: f"^{{{power[0].translate(_SUPERSCRIPTS)}}}", text)
    text = _CONDITION.sub("", text)
    text = _LIST_COMMA.sub(lambda comma: f" {comma[1] or comma[2]} ", text)
    text = _SPACE.sub(" ", _DELIMITER.sub("", text))
    text = _SCIENTIFIC.sub(lambda number: rf"{number[1]} \times 10^{{{int(number[2])}}}", text)
    text = _REPEATING.sub(_fraction, text)
    for pattern, replacement in _RENAMED:
        text = pattern.sub(replacement, text)
    text = _MIXED.sub(r"\1\\frac{\2}{\3}", text)
    text = _UNIT_POWER.sub("", text.strip().removesuffix(".").rstrip())
    return _SET_BUILDER.sub(r"\1", text).strip()


def announced(text: str) -> str | None:
    """What is in the last `<answer>` tag, else what follows the last `answer is` or `answer:`, to the end of its
    sentence."""
    _, tag, tagged = text.rpartition("<answer>")
    if tag and (inside := tagged.partition("</answer>")[0].strip()):
        return inside
    places = list(_ANNOUNCED.finditer(text))
    if not places:
        return None
    phrase = places[-1][1].strip().strip("*")
    end = _SENTENCE_END.search(phrase)
    return phrase[: end.start()] if end else phrase


def _fraction(number: re.Match[str]) -> str:
    """A decimal with digits that repeat for ever, as a fraction."""
    whole, first, repeated = number.groups()
    value = int(whole + first + repeated or "0") - int(whole + first or "0")
    return rf"\frac{{{value}}}{{{(10 ** len(repeated) - 1) * 10 ** len(first)}}}"


def answers(text: str) -> list[str]:
    """The answers that a `plain_latex` text lists, with commas, semicolons, "and" or "or" between them.

    What stands in brackets is one answer: an interval, a point, a set. A comma between groups of three digits, without
    a space, separates thousands.
    """
    parts, depth, start = [], 0, 0
    marks = sorted(
        [(mark.start(), mark.end(), "") for mark in _AND.finditer(text)]
        + [(place, place + 1, character) for place, character in enumerate(text) if character in "()[]{},;"]
        + [(found.start(), found.end(), found[1]) for found in re.finditer(r"\\(begin|end)(?=\s*\{)", text)]
    )
    thousands = {place for number in _THOUSANDS.finditer(text) for place in range(*number.span()) if text[place] == ","}
    for place, end, mark in marks:
        if mark in ("begin", *"([{"):
            depth += 1
        elif mark in ("end", *")]}"):
            depth = max(depth - 1, 0)
        elif depth == 0 and place >= start and place not in thousands:
            parts.append(text[start:place])
            start = end
    parts.append(text[start:])
    kept = [_THOUSANDS.sub(lambda number: number[0].replace(",", ""), part) if _flat(part) else part for part in parts]
    return [part.strip() for part in kept if part.strip()]


def _flat(part: str) -> bool:
    """Without brackets, in which a comma before three digits may part two numbers."""
    return not any(bracket in part for bracket in "([")


def links(part: str) -> list[str]:
    """The relations between neighbours in a chain of variables such as `a < b < c`; none when it is something else."""
    pieces = [piece.strip() for piece in _RELATION.split(part)]
    if len(pieces) < 5 or not all(len(piece) == 1 and piece.isalpha() for piece in pieces[::2]):
        return []
    return [" ".join(pieces[place : place + 3]) for place in range(0, len(pieces) - 2, 2)]


def percent(part: str) -> Decimal | None:
    """The number before the percent sign that a `plain_latex` text ends in, or None."""
    before = re.sub(r"\s*(?:\\?%|(?:\\text\s*\{\s*)?percent\s*\}?)$", "", part)
    return number(before) if before != part else None


def number(part: str) -> Decimal | None:
    """The number that a `plain_latex` text is, or None."""
    found = _NUMBER.fullmatch(part)
    if found is None:
        return None
    value = Decimal(f"{found['digits']}e{found['power'] or found['digit'] or 0}")
    return value.copy_negate() if found["sign"] == "-" else value


def equal_numbers(one: Decimal, other: Decimal) -> bool:
    """Integers exactly, others to six digits and six decimals."""
    if one == other:
        return True
    first, second = Fraction(one), Fraction(other)
    if first.denominator == second.denominator == 1:
        return False
    distance = abs(first - second)
    return distance <= Fraction(5, 10**7) and distance * 10**6 <= max(abs(first), abs(second))
