"""Characters that mean the same: as they are typed, pasted and translated, in ASCII where it has the character."""

import re

_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
_MINUS = "\N{MINUS SIGN}\N{EN DASH}\N{HYPHEN}\N{NON-BREAKING HYPHEN}\N{FIGURE DASH}\N{SMALL HYPHEN-MINUS}"
_SPACES = "\N{NO-BREAK SPACE}\N{NARROW NO-BREAK SPACE}\N{THIN SPACE}\N{FIGURE SPACE}\N{HAIR SPACE}"
_NOTHING = "\N{ZERO WIDTH SPACE}\N{ZERO WIDTH NO-BREAK SPACE}\N{WORD JOINER}\N{SOFT HYPHEN}\N{LEFT-TO-RIGHT MARK}"
_TABLE = str.maketrans(
    {
        **{chr(code): chr(ascii_code) for code, ascii_code in _FULL_WIDTH.items()},
        **dict.fromkeys(_MINUS, "-"),
        **dict.fromkeys(_NOTHING, ""),
        "\N{IDEOGRAPHIC SPACE}": " ",
        "\N{IDEOGRAPHIC FULL STOP}": ".",
        "\N{LEFT BLACK LENTICULAR BRACKET}": "[",
        "\N{RIGHT BLACK LENTICULAR BRACKET}": "]",
        "\N{MULTIPLICATION SIGN}": "\\times ",
    }
)
_HARD_SPACE = f"[{_SPACES}]"
_THIN = rf"(?:\\[,;:! ]|~|{_HARD_SPACE})"
_GROUPS = re.compile(rf"(?<![0-9.,])[0-9]{{1,3}}(?:(?:\{{,\}}|,\\!\s*|{_THIN}\s*)[0-9]{{3}})+(?![0-9])")
_SEPARATOR = re.compile(r"[^0-9]+")
_OTHER_SPACES = re.compile(_HARD_SPACE)


def in_ascii(text: str) -> str:
    """`text` with ASCII digits, signs and punctuation, and without typographic separators of thousands.

    `1{,}234`, `1\\,234`, `1,\\!234` and 1234 with a narrow space become `1234`. A separator that is a comma or an
    ordinary space stays: these may part two numbers.
    """
    if text.isascii() and not ("\\" in text or "{" in text or "~" in text):
        return text
    text = _GROUPS.sub(lambda number: _SEPARATOR.sub("", number[0]), text.translate(_TABLE))
    return _OTHER_SPACES.sub(" ", text)
