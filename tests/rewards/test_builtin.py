from decimal import Decimal

import pytest

from megatron_rl.rewards.builtin import exact, last_number, length_penalty, math, numeric


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("the answer is 42.", "42"),
        ("first 7, then 12", "12"),
        ("1,234,567", "1234567"),
        ("costs $1,200.50 in all", "1200.50"),
        ("-$3", "-3"),
        ("x = -3", "-3"),
        ("x=-3", "-3"),
        ("5-3", "3"),
        ("5 - 3", "3"),
        ("x3", "3"),
        ("\N{MINUS SIGN}8", "-8"),
        ("0.5", "0.5"),
        (".5", "0.5"),
        ("1,2,3", "3"),
        ("1,2345", "2345"),
        ("=0632", "632"),
        ("#### 72", "72"),
        ("9" * 400, "9" * 400),
    ],
)
def test_last_number(text, number):
    assert last_number(text) == Decimal(number)


@pytest.mark.parametrize("text", ["", "none", "-", "..", "\N{ARABIC-INDIC DIGIT THREE}"])
def test_text_without_a_number_has_none(text):
    assert last_number(text) is None


@pytest.mark.parametrize(
    ("response", "answer", "expected"),
    [
        ("7+5=12,=132", "132", 1.0),
        ("=132", "133", 0.0),
        ("1,000.0", "1000", 1.0),
        ("-4", "4", 0.0),
        ("no idea", "4", 0.0),
        ("so 72 it is", "9 * 8 = 72 apples\n#### 72", 1.0),
    ],
)
def test_numeric_compares_the_last_numbers(response, answer, expected):
    assert numeric("", response, answer) == expected


def test_numeric_needs_a_number_in_the_answer():
    with pytest.raises(ValueError, match="'none' has no number"):
        numeric("", "4", "none")


def test_numeric_takes_linear_time_on_long_digit_soup():
    assert last_number("1," * 200_000 + "," * 200_000 + "7") == 7


def test_exact_ignores_surrounding_white_space_only():
    assert exact("", " yes\n", "yes") == 1.0
    assert exact("", "Yes", "yes") == 0.0
    assert exact("", "y es", "yes") == 0.0


@pytest.mark.parametrize(
    ("response", "answer", "expected"),
    [
        (r"so \boxed{\frac{1}{2}}", "0.5", 1.0),
        (r"\boxed{0.5}", r"\frac{1}{2}", 1.0),
        (r"\boxed{0.5}", r"$\frac{1}{2}$", 1.0),
        (r"\boxed{0.5}", r"\boxed{\frac{1}{2}}", 1.0),
        (r"first \boxed{3}, no: \boxed{4}", "4", 1.0),
        (r"\boxed{x=3}", "3", 1.0),
        (r"\boxed{(1,2)}", "(1,2)", 1.0),
        (r"\boxed{1,234}", "1234", 1.0),
        ("The answer is 72.", "eight nines\n#### 72", 1.0),
        (r"\boxed{5}", "6", 0.0),
        ("", "6", 0.0),
    ],
)
def test_math_compares_values_not_texts(response, answer, expected):
    assert math("", response, answer) == expected


def test_math_needs_an_answer_that_parses():
    with pytest.raises(ValueError, match="cannot be parsed"):
        math("", r"\boxed{1}", "")


@pytest.mark.parametrize(("length", "penalty"), [(0, 0.0), (60, 0.0), (70, -0.5), (80, -1.0), (100, -2.0), (120, -2.0)])
def test_length_penalty_falls_linearly_from_start_to_the_limit(length, penalty):
    assert length_penalty(length, start=60, coef=2.0, max_tokens=100) == pytest.approx(penalty)
