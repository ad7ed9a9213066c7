"""Values, records and files as people and programs write them, and worse."""

import json
import math
from decimal import Decimal
from typing import Any

import numpy as np
import pandas
from hypothesis import strategies as st

TEXT = st.text(st.characters(exclude_categories=()), max_size=20)
"""With lone surrogates, control characters and whatever else a Python text can hold."""
ORDINARY = st.sampled_from(["1+1?", "What is $x$?", "héllo", "line\nline", "\u2028", "<eos>", "{{ x }}", "[red]", "[1"])
NUMBERS = st.one_of(
    st.integers(),
    st.floats(),
    st.sampled_from([0, -0.0, 1e400, 5e-324, float("nan"), 2**63, 0.1, True, False]),
)
TYPES = st.sampled_from(["text", "image_url", "input_audio", None, 3])
ROLES = st.one_of(st.sampled_from(["user", "assistant", "system", "tool", "refused"]), TEXT, st.none(), st.integers())

JSON_VALUES = st.recursive(
    st.one_of(st.none(), NUMBERS, TEXT, ORDINARY),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3)),
    max_leaves=6,
)


def maybe(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """One of `values` more often than any other value."""
    return st.one_of(values, values, values, JSON_VALUES)


PARTS = st.fixed_dictionaries({}, optional={"type": TYPES, "text": maybe(ORDINARY), "image_url": st.none()})
CONTENTS = st.one_of(ORDINARY, TEXT, st.lists(maybe(st.one_of(PARTS, ORDINARY)), max_size=3), JSON_VALUES)
MESSAGES = st.fixed_dictionaries(
    {}, optional={"role": ROLES, "content": CONTENTS, "tool_calls": st.none() | JSON_VALUES, "name": st.none() | TEXT}
)
GOOD_MESSAGES = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system"]), "content": ORDINARY | TEXT}
)
CHATS = st.one_of(st.lists(GOOD_MESSAGES, max_size=4), st.lists(GOOD_MESSAGES | MESSAGES, max_size=4))
PROMPTS = st.one_of(ORDINARY, TEXT, CHATS, CHATS.map(json.dumps), CHATS.map(str), JSON_VALUES)
ANSWERS = st.one_of(ORDINARY, NUMBERS, JSON_VALUES)
REWARD_MODELS = st.one_of(
    st.fixed_dictionaries({"style": st.just("rule")}, optional={"ground_truth": ANSWERS}),
    st.fixed_dictionaries({"ground_truth": ANSWERS}).map(json.dumps),
    JSON_VALUES,
)
RESPONSES = st.one_of(ORDINARY, CHATS, st.lists(MESSAGES, max_size=2), JSON_VALUES)

RECORDS = st.fixed_dictionaries(
    {},
    optional={
        "prompt": PROMPTS,
        "answer": ANSWERS,
        "response": RESPONSES,
        "id": maybe(st.integers(0, 3) | st.just("a")),
        "prompt_id": JSON_VALUES,
        "data_source": maybe(st.just("set")),
        "reward_model": REWARD_MODELS,
        "extra_info": maybe(st.fixed_dictionaries({"index": maybe(st.integers(0, 3))})),
        "unused": JSON_VALUES,
    },
)
GOOD_RECORDS = st.fixed_dictionaries({"prompt": PROMPTS, "answer": ANSWERS, "response": RESPONSES})


def _line(record: Any, ascii_only: bool) -> bytes:
    return json.dumps(record, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")


GOOD_LINES = st.builds(_line, GOOD_RECORDS, st.booleans())
LINES = st.builds(_line, RECORDS | GOOD_RECORDS | JSON_VALUES, st.booleans())


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A line with something cut off, put in, or doubled."""
    line = draw(LINES)
    start = draw(st.integers(0, len(line)))
    how = draw(st.sampled_from(["cut", "insert", "double", "wide", "deep", "digits"]))
    if how == "cut":
        return line[:start]
    if how == "double":
        return line[:start] + line
    if how == "wide":
        return line.decode("utf-8", "replace").encode("utf-16")
    if how == "deep":
        depth = draw(st.sampled_from([50, 150, 900, 1500, 100_000]))
        return b'{"prompt": "a", "answer": ' + b"[" * depth + b"]" * depth + b"}"
    if how == "digits":
        return line.replace(b"1", b"1" * 5000)
    return line[:start] + draw(st.binary(max_size=3)) + line[start:]


ANY_LINES = st.one_of(GOOD_LINES, LINES, damaged(), st.binary(max_size=20)).map(lambda line: line.replace(b"\n", b" "))
FILES = st.lists(ANY_LINES, min_size=1, max_size=4)
ENDINGS = st.sampled_from([b"\n", b"\r\n", b"\n\n"])

OBJECTS = st.one_of(
    JSON_VALUES,
    st.decimals(),
    st.dates(),
    st.datetimes(),
    st.timedeltas(),
    st.uuids(),
    st.binary(max_size=5),
    st.floats(width=32).map(np.float32),
    st.integers(-(2**63), 2**63 - 1).map(np.int64),
    st.lists(st.integers(0, 9), max_size=3).map(np.array),
    st.lists(GOOD_MESSAGES, max_size=3).map(lambda rows: np.array(rows, dtype=object)),
    st.lists(GOOD_MESSAGES, max_size=3).map(tuple),
    st.fractions(),
    st.integers(4300, 4310).map(lambda digits: 10**digits),
    st.sampled_from(
        [pandas.NA, pandas.NaT, np.datetime64("NaT"), np.nan, object(), {1, 2}, 1j, iter([]), int, b"\xff"]
    ),
)
"""What a function of a user's may yield."""
OBJECT_RECORDS = st.one_of(
    st.dictionaries(st.sampled_from(["prompt", "answer", "response", "id", "reward_model", "data_source"]), OBJECTS),
    st.builds(lambda prompt, answer, id: {"prompt": prompt, "answer": answer, "id": id}, PROMPTS, OBJECTS, OBJECTS),
    OBJECTS,
)


def equal_number(text: str, value: Any) -> bool:
    """Whether a text is a number that JSON's `value` is, to its last digit."""
    if isinstance(value, bool):
        return text == str(value)
    if isinstance(value, float):
        return float(text) == value and math.isfinite(value)
    return Decimal(text) == Decimal(value)
