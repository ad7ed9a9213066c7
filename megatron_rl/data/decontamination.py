"""Which training problems share text with an evaluation set, by n-grams of their words (GPT-3, arXiv 2005.14165,
appendix C)."""

import re
import unicodedata
from collections.abc import Iterable

# Words, LaTeX commands, numbers and operators; what only sets type, such as `$` and braces, does not count.
TOKEN = re.compile(r"\\?[^\W\d_]+|\d+|[^\s\w$.,;:!?'\"()\[\]{}\\~&]")


def tokens(text: str) -> tuple[str, ...]:
    """What is compared: lower-case words, LaTeX commands, numbers and operators of a text, in order."""
    return tuple(TOKEN.findall(unicodedata.normalize("NFKC", text).lower()))


class OverlapIndex:
    """The n-grams of evaluation problems.

    Two problems overlap when they share `size` tokens in a row; one that has fewer overlaps with its equal only.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._owners: dict[tuple[str, ...], str] = {}

    def add(self, texts: Iterable[tuple[str, str]]) -> None:
        """Take in (name of the problem, its text)."""
        for name, text in texts:
            for gram in self._grams(text):
                self._owners.setdefault(gram, name)

    def find(self, text: str) -> tuple[str, str] | None:
        """(name of an evaluation problem that overlaps, the shared tokens), or None."""
        for gram in self._grams(text):
            if (name := self._owners.get(gram)) is not None:
                return name, " ".join(gram)
        return None

    def _grams(self, text: str) -> Iterable[tuple[str, ...]]:
        words = tokens(text)
        if not words:
            return []
        return (words[start : start + self.size] for start in range(max(len(words) - self.size, 0) + 1))
