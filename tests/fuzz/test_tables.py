"""Parquet files with columns of the types that pandas, `datasets` and SQL exports write."""

import datetime
import decimal
import math
import tempfile
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.reading import assert_accounted, read, used_places
from tests.fuzz.strategies import GOOD_MESSAGES, ORDINARY

ROWS = 3
TEXTS = st.text(max_size=12) | ORDINARY
UTC = pyarrow.timestamp("us", "UTC")
MESSAGE = pyarrow.struct(
    [("role", pyarrow.string()), ("content", pyarrow.string()), ("tool_calls", pyarrow.list_(pyarrow.string()))]
)
PARTS = pyarrow.list_(pyarrow.struct([("type", pyarrow.string()), ("text", pyarrow.string())]))
MESSAGE_OF_PARTS = pyarrow.struct([("role", pyarrow.string()), ("content", PARTS)])
TRUTH = pyarrow.struct([("style", pyarrow.string()), ("ground_truth", pyarrow.string())])

parts = st.fixed_dictionaries({"type": st.sampled_from(["text", "image", None]), "text": st.none() | TEXTS})
messages_of_parts = st.fixed_dictionaries({"role": st.just("user"), "content": st.none() | st.lists(parts, max_size=2)})

TYPES: dict[str, tuple[pyarrow.DataType, st.SearchStrategy[Any]]] = {
    "string": (pyarrow.string(), TEXTS),
    "large_string": (pyarrow.large_string(), TEXTS),
    "string_view": (pyarrow.string_view(), TEXTS),
    "binary": (pyarrow.binary(), st.binary(max_size=8) | TEXTS.map(str.encode)),
    "fixed_binary": (pyarrow.binary(4), st.binary(min_size=4, max_size=4)),
    "int8": (pyarrow.int8(), st.integers(-128, 127)),
    "uint64": (pyarrow.uint64(), st.integers(0, 2**64 - 1)),
    "float16": (pyarrow.float16(), st.floats(width=16)),
    "float32": (pyarrow.float32(), st.floats(width=32)),
    "float64": (pyarrow.float64(), st.floats()),
    "bool": (pyarrow.bool_(), st.booleans()),
    "decimal": (pyarrow.decimal128(20, 4), st.decimals(-(10**12), 10**12, places=4)),
    "decimal256": (pyarrow.decimal256(60, 30), st.decimals(-(10**12), 10**12, places=30)),
    "date": (pyarrow.date32(), st.dates()),
    "timestamp": (UTC, st.datetimes(timezones=st.just(datetime.UTC))),
    "nanoseconds": (pyarrow.timestamp("ns"), st.integers(-(2**62), 2**62)),
    "seconds": (pyarrow.timestamp("s"), st.integers(-(2**50), 2**50)),
    "time": (pyarrow.time64("us"), st.times()),
    "duration": (pyarrow.duration("us"), st.timedeltas(datetime.timedelta(-(10**5)), datetime.timedelta(10**5))),
    "list": (pyarrow.list_(pyarrow.string()), st.lists(TEXTS, max_size=2)),
    "floats": (pyarrow.large_list(pyarrow.float64()), st.lists(st.floats(), max_size=2)),
    "chat": (pyarrow.list_(MESSAGE), st.lists(GOOD_MESSAGES.filter(lambda m: _utf8(m["content"])), max_size=3)),
    "chat of parts": (pyarrow.list_(MESSAGE_OF_PARTS), st.lists(messages_of_parts, max_size=2)),
    "map": (pyarrow.map_(pyarrow.string(), pyarrow.string()), st.lists(st.tuples(TEXTS, TEXTS), max_size=2)),
    "truth": (TRUTH, st.fixed_dictionaries({"ground_truth": st.none() | TEXTS})),
    "null": (pyarrow.null(), st.none()),
}


def _utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@st.composite
def columns(draw: st.DrawFn, kinds: list[str]) -> tuple[str, pyarrow.Array]:
    """(kind, array of `ROWS` values), some of them null, some dictionary-encoded, some with text that is not UTF-8."""
    kind = draw(st.sampled_from(kinds))
    arrow_type, values = TYPES[kind]
    cells = draw(st.lists(st.none() | values | values, min_size=ROWS, max_size=ROWS))
    with decimal.localcontext(prec=80):
        array = pyarrow.array(cells, arrow_type)
    if kind == "string" and draw(st.booleans()):
        array = array.dictionary_encode()
    elif kind == "binary" and draw(st.booleans()):
        array = array.view(pyarrow.string())
    return kind, array


ANY = list(TYPES)
CHAT = ["string", "large_string", "binary", "chat", "chat of parts"]


@pytest.fixture(scope="module")
def file() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "set.parquet"


@given(
    prompt=columns(CHAT) | columns(CHAT) | columns(ANY),
    answer=columns(ANY),
    others=st.dictionaries(st.sampled_from(["id", "response", "data_source", "extra_info", "unused"]), columns(ANY)),
    truth=st.none() | columns(["truth", "string", "map", "null"]),
    needs=st.sampled_from(["answer", "response"]),
)
def test_no_column_ends_a_run_and_what_is_used_is_what_it_says(
    file: Path, prompt: Any, answer: Any, others: Any, truth: Any, needs: str
) -> None:
    chosen = {"prompt": prompt, "answer": answer, **others} | ({"reward_model": truth} if truth else {})
    pyarrow.parquet.write_table(pyarrow.table({name: array for name, (_, array) in chosen.items()}), file)
    found = read(str(file), needs)
    if found is None:
        return
    places = [f"{file}:{row}" for row in range(ROWS)]
    assert_accounted(found, places)
    if truth is not None or needs == "response":
        return
    kind, array = answer
    for place, used in zip(used_places(found, places), found.prompts, strict=True):
        assert_same(used.answer, kind, array[places.index(place)])


def assert_same(text: str, kind: str, cell: pyarrow.Scalar) -> None:
    """The text of an answer is what is in its cell."""
    assert text.strip() and text not in ("None", "nan", "NaN", "inf", "NaT")
    if kind in ("string", "large_string", "string_view"):
        assert text == cell.as_py()
    elif kind in ("binary", "fixed_binary"):
        value = cell.as_py()
        assert text == (value if isinstance(value, str) else value.decode())
    elif kind in ("int8", "uint64", "float64"):
        assert float(text) == cell.as_py() and math.isfinite(float(text))
    elif kind in ("float16", "float32"):
        assert (np.float16 if kind == "float16" else np.float32)(text) == cell.as_py()
    elif kind.startswith("decimal"):
        assert Decimal(text) == cell.as_py() and "E" not in text
    elif kind in ("bool", "date", "timestamp", "time", "duration"):
        assert text == str(cell.as_py())
