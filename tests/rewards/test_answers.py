"""Final answers in a normal form: equal ones count as one vote."""

import pytest

from megatron_rl.rewards.answers import final_answer
from megatron_rl.rewards.builtin import boxed, choice, last_letter


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{1} then \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{}", None),
        (r"\boxed{5} and \boxed{} and \boxed{6", "5"),
        (r"\boxed{\{1\}}", r"\{1\}"),
        (r"\boxed{1", None),
        ("no box", None),
    ],
)
def test_the_last_box_counts_with_its_own_braces(text: str, content: str | None) -> None:
    assert boxed(text) == content


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{\dfrac{1}{2}}.", r"\frac{1}{2}"),
        (r"so $\boxed{ \frac{1}{2} }$", r"\frac{1}{2}"),
        (r"\boxed{1,000}", "1000"),
        (r"\boxed{\$1,200.50}", "1200.5"),
        (r"\boxed{90^\circ}", "90"),
        (r"\boxed{(1, 2)}", "(1,2)"),
        (r"\boxed{1,2}", "1,2"),
        (r"\boxed{\text{(B)}}", "B"),
        (r"\boxed{1e999999999}", "1e999999999"),
        (r"\boxed{-0.0}", "0"),
        ("=03496", "3496"),
        ("#### 72", "72"),
        ("that is 2.50", "2.5"),
        ("The answer is (C).", "C"),
        ("I do not know", None),
        (r"\boxed{}", None),
        (r"\boxed{9\%}", "9%"),
        (r"\boxed{4,\!500}", "4500"),
        (r"\boxed{\text{(B) A cat}}", "B"),
        ("The answers are $8$ and $4$.", "8,4"),
        ("Answer: 4.5e3", "4500"),
    ],
)
def test_final_answers(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        (r"A or C? \boxed{C}", "C"),
        (r"\boxed{\textbf{(D)}\ 12}", "D"),
        (r"\boxed{12}", None),
        ("answer: a dog", None),
        ("The answer is B, not A. So the answer is **A**", "A"),
        ("Answer: (J)", "J"),
        ("(B)", "B"),
        ("A cat", None),
    ],
)
def test_letters(text: str, letter: str | None) -> None:
    assert last_letter(text) == letter


def test_the_choice_reward_compares_letters() -> None:
    assert choice("", r"\boxed{B}", "B") == 1.0
    assert choice("", r"\boxed{B}", "C") == 0.0
    assert choice("", "no idea", "C") == 0.0
    with pytest.raises(ValueError, match="'12' is not a letter"):
        choice("", r"\boxed{B}", "12")
