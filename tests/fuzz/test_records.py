"""Whatever a file holds: no traceback but one sentence, nothing changed, and each record that is left out is named."""

import json
import sys
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.config import ConfigError
from megatron_rl.data.intake import Intake
from megatron_rl.data.public import EVALUATION, TRAINING, read_problems
from tests.fuzz.reading import assert_accounted, assert_sentence, read, used_places
from tests.fuzz.strategies import (
    ENDINGS,
    FILES,
    GOOD_RECORDS,
    JSON_VALUES,
    OBJECT_RECORDS,
    RECORDS,
    equal_number,
    maybe,
)

NEEDS = st.sampled_from(["answer", "response"])


@pytest.fixture(scope="module")
def file() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "set.jsonl"


@given(lines=FILES, ending=ENDINGS, needs=NEEDS, bom=st.booleans())
def test_no_line_ends_a_run_and_each_is_accounted_for(
    file: Path, lines: list[bytes], ending: bytes, needs: str, bom: bool
) -> None:
    content = ending.join(lines)
    file.write_bytes(("\ufeff".encode() if bom else b"") + content)
    found = read(str(file), needs)
    if found is not None:
        with file.open("rb") as read_again:
            places = [f"{file}:{number}" for number, line in enumerate(read_again, 1) if line.strip()]
        assert_accounted(found, places)


@given(records=st.lists(GOOD_RECORDS | RECORDS, min_size=1, max_size=3), needs=NEEDS)
def test_what_is_used_of_a_record_is_what_it_says(file: Path, records: list[dict[str, Any]], needs: str) -> None:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    found = read(str(file), needs)
    if found is None:
        return
    places = [f"{file}:{number}" for number in range(1, len(records) + 1)]
    assert_accounted(found, places)
    for place, prompt in zip(used_places(found, places), found.prompts, strict=True):
        record = records[places.index(place)]
        assert_same_prompt(prompt.text, record["prompt"])
        if needs == "answer":
            assert_same_answer(prompt.answer, record)
        else:
            assert_same_response(prompt.response_text, record["response"])


def assert_same_prompt(text: str, prompt: Any) -> None:
    chat = prompt
    if isinstance(prompt, str):
        try:
            chat = json.loads(prompt)
        except (ValueError, RecursionError):
            chat = None
        is_chat = isinstance(chat, list) and chat and all(isinstance(m, dict) and "role" in m for m in chat)
        if not (is_chat and text.startswith("<|")):
            assert text == prompt
            return
    expected = "".join(f"<|{m['role']}|>{content_of(m)}<|end|>" for m in chat)
    last = chat[-1]["role"] == "assistant"
    expected = expected.removesuffix("<|end|>") if last else expected + "<|assistant|>"
    # The template engine takes one line end off a text; a continued message loses white space at its end.
    assert text == expected or (last and text.rstrip() == expected.rstrip())


def content_of(message: dict[str, Any]) -> str:
    content = message.get("content")
    if content is None:
        assert message["tool_calls"]
        return ""
    if isinstance(content, str):
        return content
    return "\n".join(part if isinstance(part, str) else part["text"] for part in content)


def assert_same_answer(answer: str, record: dict[str, Any]) -> None:
    reward_model = record.get("reward_model")
    if isinstance(reward_model, str):
        try:
            reward_model = json.loads(reward_model)
        except (ValueError, RecursionError):
            reward_model = None
    truth = reward_model.get("ground_truth") if isinstance(reward_model, dict) else None
    value = record.get("answer") if truth is None else truth
    if isinstance(value, str):
        assert answer == value and value.strip()
    elif isinstance(value, int | float):
        assert equal_number(answer, value)
    else:
        assert value and json.loads(answer) == value


def assert_same_response(response: str | None, value: Any) -> None:
    assert response is not None and response.strip()
    if isinstance(value, list):
        assert response == content_of(value[0]) and len(value) == 1
    elif isinstance(value, str) and response != value:
        assert response == content_of(json.loads(value)[0])
    elif not isinstance(value, str):
        assert equal_number(response, value)


@given(records=st.lists(GOOD_RECORDS, min_size=1, max_size=4, unique_by=repr))
def test_ids_do_not_depend_on_the_other_records(file: Path, records: list[dict[str, Any]]) -> None:
    def ids(chosen: list[dict[str, Any]]) -> dict[str, str]:
        file.write_text("".join(json.dumps(record) + "\n" for record in chosen))
        found = read(str(file))
        return {} if found is None else {prompt.prompt_id: prompt.text for prompt in found.prompts}

    together = ids(records)
    assert together == ids(records[::-1]) or any("-" in name for name in together)
    for record in records:
        assert set(ids([record]).items()) <= set(together.items())


@given(records=st.lists(OBJECT_RECORDS, min_size=1, max_size=4), needs=NEEDS)
def test_no_object_of_a_function_ends_a_run(records: list[Any], needs: str) -> None:
    module = types.ModuleType("fuzzed_source")
    module.records = lambda: records  # type: ignore[attr-defined]
    sys.modules["fuzzed_source"] = module
    module.__spec__ = __spec__
    try:
        found = read("fuzzed_source:records", needs)
    finally:
        del sys.modules["fuzzed_source"]
    if found is not None:
        assert_accounted(found, [f"fuzzed_source:records:{place}" for place in range(len(records))])


COLUMNS = st.one_of(JSON_VALUES, st.lists(JSON_VALUES, max_size=4), RECORDS, st.integers(-1, 5))
SETS = {"evaluation": EVALUATION, "training": TRAINING}


@given(data=st.data(), which=st.sampled_from([f"{kind}/{name}" for kind in SETS for name in SETS[kind]]))
def test_no_row_of_a_public_set_ends_a_run(file: Path, data: st.DataObject, which: str) -> None:
    kind, _, name = which.partition("/")
    sets = SETS[kind]
    good = {"question": "q", "problem": "q", "answer": "1 #### 2", "final_answer": ["1"], "choices": ["a", "b"]}
    good |= {"prompt": [{"role": "user", "content": "q"}], "ability": "math", "reward_model": {"ground_truth": "1"}}
    good |= {"extra_info": {"question": "q", "answer": "1"}}
    columns = {column: maybe(st.just(good[column])) | COLUMNS for column in sets[name].columns}
    rows = data.draw(st.lists(st.fixed_dictionaries(columns), min_size=1, max_size=3))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    intake = Intake(name, "data.eval", "data.max_left_out", 1.0)
    try:
        problems = read_problems(f"{name}={file}", sets, intake)
        intake.conclude()
    except ConfigError as error:
        assert_sentence(str(error))
        return
    for problem in problems.values():
        (problem.text + problem.answer).encode()
        assert problem.text.strip() and problem.answer.strip()
    if not any("ability" in row for row in rows):
        assert len(problems) + len(intake.left_out) == len(rows)
