"""Values of the types that Parquet, pandas, SQL exports and functions give, as texts."""

import datetime
import uuid
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from typing import Any

import numpy as np
import pandas
import pytest

from megatron_rl.data.intake import BrokenRecord
from megatron_rl.data.values import Unreadable, as_dict, identifier, plain, text_of


class Color(str, Enum):  # noqa: UP042 - as users write them
    RED = "red"


def answer(value: Any) -> str:
    return text_of(plain(value), "answer")


def reason(value: Any) -> str:
    with pytest.raises(BrokenRecord) as caught:
        answer(value)
    return caught.value.reason


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("as it is \n", "as it is \n"),
        (7, "7"),
        (4.5, "4.5"),
        (27.0, "27.0"),
        (1e-7, "1e-07"),
        (True, "True"),
        (np.bool_(False), "False"),
        (np.int64(-3), "-3"),
        (np.float64(0.1), "0.1"),
        (np.float32(0.1), "0.1"),
        (np.float16(0.1), "0.1"),
        (np.str_("a"), "a"),
        (Color.RED, "red"),
        (Decimal("4.50"), "4.50"),
        (Decimal("1E+3"), "1000"),
        (Decimal("-0.000001"), "-0.000001"),
        (Decimal("1E-999999"), "1E-999999"),
        (Fraction(1, 3), "1/3"),
        (datetime.date(2024, 5, 1), "2024-05-01"),
        (datetime.datetime(2024, 5, 1, 12, 30), "2024-05-01 12:30:00"),
        (pandas.Timestamp("2024-05-01"), "2024-05-01 00:00:00"),
        (np.datetime64("2024-05-01"), "2024-05-01"),
        (datetime.time(12, 30), "12:30:00"),
        (uuid.UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        ("héllo".encode(), "héllo"),
        (memoryview(b"5"), "5"),
        (["a", "b"], '["a", "b"]'),
        (("a", 2), '["a", 2]'),
        (np.array(["a", "b"], dtype=object), '["a", "b"]'),
        (np.array([1, 2]), "[1, 2]"),
        (pandas.Series([1.5]), "[1.5]"),
        ([Decimal("4.50"), datetime.date(2024, 5, 1)], '["4.50", "2024-05-01"]'),
        ({"x": np.int32(1)}, '{"x": 1}'),
    ],
)
def test_a_reference_of_any_type_is_its_plain_text(value: Any, text: str) -> None:
    assert answer(value) == text


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (None, "no answer"),
        (pandas.NA, "no answer"),
        (pandas.NaT, "no answer"),
        (np.datetime64("NaT"), "no answer"),
        ("", "empty answer"),
        (" \n", "empty answer"),
        ([], "empty answer"),
        ({}, "empty answer"),
        (float("nan"), "answer that is not finite"),
        (float("-inf"), "answer that is not finite"),
        (np.float32("nan"), "answer that is not finite"),
        (np.array(np.nan), "answer that is not finite"),
        (Decimal("NaN"), "answer that is not finite"),
        (Decimal("sNaN"), "answer that is not finite"),
        (Decimal("Infinity"), "answer that is not finite"),
        ([1.0, float("nan")], "answer with a number that JSON does not have"),
        ("\ud83d", "half of a surrogate pair, which is no character"),
        ({"a": ["\udc00"]}, "half of a surrogate pair, which is no character"),
        ({"\udc00": 1}, "half of a surrogate pair, which is no character"),
        (b"\xff\xfe", "bytes that are not UTF-8 text"),
        (object(), "a value of type object, which is neither text nor number"),
        ({1, 2}, "a value of type set, which is neither text nor number"),
        (1j, "a value of type complex, which is neither text nor number"),
        (Unreadable("year 10000"), "year 10000"),
    ],
)
def test_what_is_no_reference_says_why(value: Any, why: str) -> None:
    assert reason(value) == why


def test_integers_that_python_does_not_write_are_written() -> None:
    assert answer(10**5000) == identifier(10**5000) == "1" + "0" * 5000
    assert reason([10**5000]) == "answer with a number that JSON does not have"


def test_values_nested_without_end_are_refused_at_a_depth_that_does_not_depend_on_the_caller() -> None:
    value: list[Any] = []
    for _ in range(99):
        value = [value]
    assert plain(value) == value
    assert reason([[value]]) == "nested too deeply"
    value.append(value)
    assert reason(value) == "nested too deeply"


@pytest.mark.parametrize("value", [None, "", float("nan"), pandas.NA, np.nan, Decimal("NaN")])
def test_an_empty_cell_is_no_id(value: Any) -> None:
    assert identifier(value) is None


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (7, "7"),
        (0, "0"),
        ("a", "a"),
        (b"row-1", "row-1"),
        (uuid.UUID(int=255).bytes + b"\xff", "0" * 30 + "ffff"),
        (np.int64(7), "7"),
        (["a", 1], '["a", 1]'),
    ],
)
def test_an_id_of_any_type_is_a_text(value: Any, text: str) -> None:
    assert identifier(value) == text


def test_a_column_of_dicts_may_be_json_text() -> None:
    assert as_dict('{"ground_truth": "72"}') == as_dict({"ground_truth": "72"}) == {"ground_truth": "72"}
    for other in (None, float("nan"), "{", "72", '["a"]', [1], '{"a":' * 100_000):
        assert as_dict(other) == {}
