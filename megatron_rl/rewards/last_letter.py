"""The reward `choice`: the letter that a text chooses."""

import re

from megatron_rl.rewards.boxes import boxed, without_boxes
from megatron_rl.rewards.characters import in_ascii
from megatron_rl.rewards.judgement import Judgement, compare

# Typesetting goes, what it is around stays.
_COMMAND = re.compile(r"\\(?:text\w*|math\w+|operatorname|mbox|bold\w*|left|right|displaystyle|bf|rm)(?![a-zA-Z])")
_SPACE = re.compile(r"\\(?:q?quad(?![a-zA-Z])|[,;:! ]|\\)|~")
_MARKUP = re.compile(r"\\[()\[\]]|[$*`{}#>\"\u201c\u201d]|(?<![A-Za-z0-9])_+|_+(?![A-Za-z0-9])")

_TAG = re.compile(r"</?[a-zA-Z][^<>\n]{0,40}>")

_LABELLED = re.compile(r"(?<![A-Za-z])(?:\(([A-Za-z])\)|\[([A-Za-z])\])")
_LETTER = r"(?:\([A-Za-z]\)|\[[A-Za-z]\]|[A-Z](?![A-Za-z0-9_^'\u2019(])[).]?)"
_LIST = re.compile(rf"{_LETTER}(?:\s*(?:[,;&/+]|,?\s*\band\b|,?\s*\bor\b)\s*{_LETTER})*")
_RUN = re.compile(r"[(\[]?([A-H]{2,8})[)\]]?(?=\s*\.?\s*$)", re.MULTILINE)
_LOWER = re.compile(r"([a-z])[).]?\s*$", re.MULTILINE)
_SENTENCE_END = re.compile(r"\s*(?:$|\n|[.;!?](?!\w))")
_LEADING = re.compile(
    r"\(([A-Za-z])\)|\[([A-Za-z])\]|([A-Z])(?:[).:](?![A-Za-z0-9])|\s+-\s+(?=[A-Za-z]{2}))|([a-z])\)(?![A-Za-z0-9])"
)
_ARTICLE = re.compile(  # "A cat", "I think": a word follows that is no continuation of a sentence about a choice
    r"[AI]\s+(?!(?:and|or|as|because|since|for|but|not|is|was|by|due|from|given|if|in|rather|instead|which|that|with|so|"
    r"to|over|on|only|would|does|here)\b)[a-z]"
)
_BARE = re.compile(r"(?<![A-Za-z\\0-9^_])(?<![0-9] )([A-HJ])(?![A-Za-z0-9_^'\u2019(])")

_CALLED = r"(?:the\s+)?(?:correct\s+|best\s+|right\s+)?(?:(?:option|choice|answer|letter|alternative)\s*:?\s*)?"
_ADVERB = (
    r"(?:(?:therefore|thus|hence|then|clearly|obviously|simply|just|indeed|actually|definitely|probably|most|likely)"
    r",?\s+)*"
)
# A choice is announced by one of these words, and what follows or stands before it decides: looking for the words alone
# is fast in a long text, which is in lower case for that.
_KEYWORD = re.compile(
    r"answer|option|choice|letter|alternative|selection|choose|chose|pick|select|go with|going with|went with|which is|"
    r"corresponds to|matches|i\.e\.|namely|correct|right|best|\u7b54\u6848|\u9009"
)
_IS = r"\s*(?:\b(?:is|be|must\s+be|should\s+be|would\s+be)\b|[:=]|->|-(?=\s))*\s*"
_AFTER_KEYWORD = re.compile(
    r"(?i:"
    r"(?:answer|(?:option|choice|letter|alternative|selection))\b(?:,\s*\w+,)?"
    r"(?:\s+(?:to|for|of|here|choice|option|letter)\b[^.:\n]{0,60}?(?=\s+is\b|\s*[:=]))?" + _IS + r"|"
    r"(?:choose|chose|pick|picked|select|selected|go\s+with|going\s+with|went\s+with)\s+|"
    r"(?:which\s+is|corresponds\s+to|matches|i\.e\.,?|namely)\s+(?=(?:the\s+)?(?:option|choice|answer|letter)\b)|"
    r"(?:\u7b54\u6848|\u9009\u9879|\u9009\u62e9|\u9009)\s*(?:\u5e94\u8be5\u662f|\u5e94\u4e3a|\u662f|\u4e3a|:)*\s*"
    r")(?i:" + _ADVERB + _CALLED + ")"
)
QUALIFIED = ("option", "choice", "letter", "alternative", "selection")
"""These announce a choice only after an adjective: `the correct option is B`."""
_QUALIFIER = re.compile(r"(?i:correct|right|best|final|my)\s+$")
_CONFIRMED = re.compile(  # before "correct", "right" or "best"
    r"(?<![A-Za-z])(?:\(([A-Za-z])\)|\[([A-Za-z])\]|([A-Z])[).]?)\s+(?i:is|must\s+be|seems)\s+"
    r"(?i:the\s+|therefore\s+|clearly\s+|most\s+|only\s+)*$"
)


def last_letter(text: str) -> str | None:
    """The letter that a text chooses, as a capital; several, in their order, when it chooses several (`AC`).

    It is the letter of the last box; without one the last that is announced (`the answer is`, `I choose`, `is
    correct`, ...); else the one that the text, or its last line, consists of or begins with. A labelled letter, such as
    `(B)` or `B.`, goes before any other; the article A and the pronoun I are no choices. None when it chooses none.
    """
    box = boxed(text)
    if box is not None and (chosen := _of_phrase(_plain(box), whole=True)):
        return chosen
    text = _plain(text if box is not None else without_boxes(text))
    return _announced(text) or _of_lines(text)


def _plain(text: str) -> str:
    text = _TAG.sub(lambda tag: "\nanswer: " if tag[0].lower() == "<answer>" else "", text)
    text = _COMMAND.sub("", _SPACE.sub(" ", in_ascii(text)))
    return _MARKUP.sub("", text).strip()


def _announced(text: str) -> str | None:
    """The choice in the last place that announces one."""
    lower = text.lower()
    for keyword in reversed(list(_KEYWORD.finditer(lower if len(lower) == len(text) else text))):
        before, word = text[max(keyword.start() - 40, 0) : keyword.start()], keyword[0]
        if before[-1:].isascii() and before[-1:].isalpha():
            continue
        if word in ("correct", "right", "best"):
            if found := _CONFIRMED.search(before):
                return _group(found)
        elif word in QUALIFIED and not _QUALIFIER.search(before):
            continue
        elif (place := _AFTER_KEYWORD.match(text, keyword.start())) and (
            chosen := _of_phrase(text[place.end() : place.end() + 200], whole=False)
        ):
            return chosen
    return None


def _of_phrase(phrase: str, whole: bool) -> str | None:
    """The choice that a phrase begins with; if the phrase is an answer as a `whole`, the only one that it has."""
    if run := _RUN.match(phrase):
        letters = run[1]
        if "".join(sorted(set(letters))) == letters:
            return letters
    if (lower := _LOWER.match(phrase)) and (not whole or lower.end() == len(phrase)):
        return lower[1].upper()
    listed = _LIST.match(phrase)
    if listed:
        several = _letters(listed[0])
        if len(several) > 1 and _SENTENCE_END.match(phrase, listed.end()):
            return several
    if leading := _LEADING.match(phrase):
        return _group(leading)
    if listed and not _ARTICLE.match(phrase) and (not whole or len(_letters(listed[0])) == 1):
        return _letters(listed[0])[0] if whole else re.sub(r"[^A-Za-z]", "", listed[0])[0].upper()
    line = phrase.partition("\n")[0]
    labelled = {_group(found) for found in _LABELLED.finditer(line)}
    if len(labelled) == 1:
        return labelled.pop()
    if whole:
        bare = {found[1] for found in _BARE.finditer(phrase) if not _ARTICLE.match(phrase, found.start())}
        return bare.pop() if len(bare) == 1 else None
    return None


def _of_lines(text: str) -> str | None:
    """The choice of a text that announces none: its last line if that is a letter, else the label that it begins
    with, if no other line begins with another."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return None
    last = re.sub(r"^(?i:option|choice|letter)\s+", "", lines[-1])
    listed = _LIST.fullmatch(last.rstrip(".:!")) or re.fullmatch(r"([a-z])[).]?", last)
    if listed:
        return _letters(listed[0].upper())
    if (run := _RUN.fullmatch(last)) and "".join(sorted(set(run[1]))) == run[1]:
        return run[1]
    labels = {_group(label) for line in lines if (label := _LEADING.match(line))}
    return labels.pop() if len(labels) == 1 and _LEADING.match(lines[0]) else None


def _letters(text: str) -> str:
    """The letters of a list, sorted, each once."""
    return "".join(sorted({letter.upper() for letter in re.findall(r"(?<![A-Za-z])[A-Za-z](?![A-Za-z])", text)}))


def _group(found: re.Match[str]) -> str:
    return next(group for group in found.groups() if group).upper()


def judge_choice(response: str, answer: str) -> Judgement:
    """Is the chosen letter (see `last_letter`) the answer's?

    Raises:
        ValueError: when the answer is not a letter.
    """
    expected = last_letter(answer)
    if expected is None:
        raise ValueError(f"the reference answer {answer!r} is not a letter")
    return compare(expected, last_letter(response), "no letter is chosen")
