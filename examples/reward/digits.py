"""A reward of its own: for the answer, and, below zero, for how near a wrong one comes."""

import re

FINAL = re.compile(r"=([0-9]+)\s*$")


def score(prompt: str, response: str, answer: str) -> float:
    """Score an answer that has to stand at the end, behind an equals sign: `=03496`.

    Partial credit is negative: evaluation counts every response with a positive score as right.

    Args:
        prompt: the problem, such as `00437*08?`; not needed here.
        response: what the model wrote.
        answer: the right number, without leading zeros: `3496`.

    Returns:
        1 for the right number; for a wrong one -0.5 times the share of digits that differ, so at least -0.5; -1 for a
        response that does not end in `=` and digits.

    Raises:
        ValueError: when the answer is not a number; the response then counts as 0 and the log names the record.
    """
    expected = int(answer)
    final = FINAL.search(response)
    if final is None:
        return -1.0
    if int(final[1]) == expected:
        return 1.0
    return -0.5 * wrong_digits(final[1], str(expected))


def wrong_digits(found: str, expected: str) -> float:
    """The share of digits that differ, the numbers written with the same number of digits, in (0, 1]."""
    width = max(len(found), len(expected))
    pairs = zip(found.zfill(width), expected.zfill(width), strict=True)
    return sum(a != b for a, b in pairs) / width
