"""The answer in a box: `\\boxed{...}`."""

import re

_BRACE = re.compile(r"\\(?:boxed|fbox)\s*\{|(?<!\\)\\[{}]|[{}]")  # \{ and \} are characters of the content
_NOTHING = re.compile(
    r"(?:\\(?:text\w*|mathrm|mathbf|quad|ldots|dots|cdots|[,;:! ])|[\s{}$~.\N{HORIZONTAL ELLIPSIS}_])*"
)


def boxed(text: str) -> str | None:
    """The content of the last box in `text` that is closed and not empty, or None without one.

    A box of dots is a placeholder, so it is empty. Takes time linear in the length.
    """
    return _last_box(text)[0]


def without_boxes(text: str) -> str:
    """`text` where `boxed` finds nothing: without its empty boxes, and without what a box that is never closed holds.

    A box is cut off when the response reaches its limit: what it holds may be a part of the answer.
    """
    return _last_box(text)[1]


def _last_box(text: str) -> tuple[str | None, str]:
    if "box" not in text:
        return None, text
    last: tuple[int, str] | None = None
    opened: list[tuple[int, int] | None] = []  # of a box: where it starts and where its content does
    empty: list[tuple[int, int]] = []
    for brace in _BRACE.finditer(text):
        token = brace[0]
        if len(token) > 2:
            opened.append((brace.start(), brace.end()))
        elif token == "{":
            opened.append(None)
        elif token == "}" and opened and (box := opened.pop()) is not None:
            start, inside = box
            content = text[inside : brace.start()] if last is None or start > last[0] else ""
            if not _NOTHING.fullmatch(content):
                last = start, content
            else:
                empty.append((start, brace.end()))
    if last is not None:
        return last[1].strip(), text
    unclosed = min((box[0] for box in opened if box is not None), default=len(text))
    kept, place = [], 0
    for start, end in sorted(empty):
        if start >= place:
            kept.append(text[place : min(start, unclosed)])
            place = end
    kept.append(text[place:unclosed])
    return None, "".join(kept)
