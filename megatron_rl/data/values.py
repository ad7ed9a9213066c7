"""Values of records, of the types that JSON, Parquet, pandas, `datasets`, SQL exports and a user's function give."""

import datetime
import json
import math
import sys
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from numbers import Real
from typing import Any

import numpy as np

from megatron_rl.data.intake import TOO_DEEP, BrokenRecord

DEEPEST = 100  # levels of lists and dicts
LONGEST_PLAIN = 100  # digits before or after the point, up to which a Decimal is written without an exponent

TIMES = (datetime.date, datetime.time, datetime.timedelta, np.datetime64, np.timedelta64, uuid.UUID)
"""What is written by `str`, such as 2024-05-01 or 12:30:00."""


@dataclass(frozen=True)
class Unreadable:
    """Stands for a value that could not be converted; it matters only where the value is used."""

    reason: str


def plain(value: Any, levels: int = DEEPEST) -> Any:
    """A value as None, text, bool, number, date, or lists and dicts of these, whatever library it comes from.

    Args:
        value: from a record.
        levels: so many levels of lists and dicts may be in each other.

    Raises:
        BrokenRecord: for half a surrogate pair, bytes that are not UTF-8, and types that are no data.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _checked(str.__str__(value))
    if isinstance(value, Unreadable):
        raise BrokenRecord(value.reason)
    if levels < 0:
        raise BrokenRecord(TOO_DEEP)
    if isinstance(value, Mapping):
        return {_checked(str(key)): plain(item, levels - 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, levels - 1) for item in value]
    if isinstance(value, bytes | bytearray | memoryview):
        return _decoded(bytes(value))
    return _plain_scalar(value, levels)


def _plain_scalar(value: Any, levels: int) -> Any:
    if isinstance(value, np.floating):
        return float(str(value))  # of a float32, the digits that were meant: 0.1, not 0.10000000149011612
    if _is_missing(value):
        return None
    if isinstance(value, np.bool_ | np.integer):
        return value.item()
    if isinstance(value, (Real, Decimal, *TIMES)):
        return value
    if hasattr(value, "tolist"):  # arrays, pandas' Series, tensors
        return plain(value.tolist(), levels - 1)
    raise BrokenRecord(f"a value of type {type(value).__name__}, which is neither text nor number")


def _is_missing(value: Any) -> bool:
    """pandas' NA and NaT, and numpy's NaT. Where pandas is not imported, there is no value of it."""
    pandas = sys.modules.get("pandas")
    if pandas is not None and (value is getattr(pandas, "NA", None) or value is getattr(pandas, "NaT", None)):
        return True
    return isinstance(value, np.datetime64 | np.timedelta64) and bool(np.isnat(value))


def _checked(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BrokenRecord("half of a surrogate pair, which is no character", f"at character {error.start}") from None
    return text


def _decoded(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise BrokenRecord("bytes that are not UTF-8 text") from None


def text_of(value: Any, what: str) -> str:
    """The text of a plain value: of a number its digits, of a list or dict its JSON.

    Args:
        value: as from `plain`.
        what: what it is, for messages: `answer`.

    Raises:
        BrokenRecord: when there is none, it is white space, or a number that is not finite.
    """
    if value is None:
        raise BrokenRecord(f"no {what}")
    if isinstance(value, list | dict):
        text = _json_text(value, what) if value else ""
    else:
        text = _number_text(value, what) if isinstance(value, Real | Decimal) else str(value)
    if not text.strip():
        raise BrokenRecord(f"empty {what}")
    return text


def _json_text(value: list[Any] | dict[str, Any], what: str) -> str:
    try:
        return json.dumps(value, default=lambda item: text_of(item, what), allow_nan=False)
    except BrokenRecord:
        raise
    except ValueError as error:
        raise BrokenRecord(f"{what} with a number that JSON does not have", str(error)) from None


def _number_text(value: Real | Decimal, what: str) -> str:
    if not _is_finite(value):
        raise BrokenRecord(f"{what} that is not finite")
    if isinstance(value, Decimal):
        return format(value, "f") if abs(value.adjusted()) < LONGEST_PLAIN else str(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(Decimal(int(value)))  # Python writes no int of more than 4300 digits
    return str(value)


def _is_finite(value: Any) -> bool:
    if isinstance(value, Decimal):
        return value.is_finite()
    return math.isfinite(value) if isinstance(value, float) else True


def identifier(value: Any) -> str | None:
    """The text of an id; None where there is none, as in the empty cells of a table."""
    if isinstance(value, bytes | bytearray | memoryview):
        try:
            return _decoded(bytes(value)) or None
        except BrokenRecord:
            return bytes(value).hex()
    value = plain(value)
    if value is None or value == "" or not _is_finite(value):
        return None
    # pandas makes floats of a column of integers where one is missing.
    return text_of(int(value) if isinstance(value, float) and value.is_integer() else value, "id")


def as_dict(value: Any) -> dict[str, Any]:
    """A column of dicts, which some exports hold as JSON text; empty where it is anything else."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return {}
    return dict(value) if isinstance(value, Mapping) else {}
