"""Records from a user's function, named in `data.train` or `data.eval`."""

import os

import pytest

from megatron_rl.config import ConfigError
from megatron_rl.config.sections import DataConfig
from megatron_rl.data import load_prompts
from megatron_rl.data.intake import Intake
from megatron_rl.data.rows import is_function, read_rows
from megatron_rl.models.scratch import character_tokenizer

MODULE = """
import numpy

ROWS = [
    {"prompt": "1+1?", "answer": "2", "response": "=2"},
    {"prompt": "2+5?", "answer": 7},
    {"id": "third", "prompt": [{"role": "user", "content": "3+3?"}], "answer": numpy.int64(6)},
]
number = 3

def listed(): return ROWS
def yielded(): yield from ROWS
def verl(): yield {"data_source": "set", "prompt": "q", "reward_model": {"ground_truth": 5}, "extra_info": {"index": 9}}
def mixed(): return ["text", *ROWS, None]
def nothing(): return []
def texts(): return "ab"
def no_prompt(): return [{"question": "q", "answer": "a"}]
def prompt_is_a_number(): return [{"prompt": 3, "answer": "a"}]
def none(): pass
def wants_an_argument(split): return ROWS
def fails():
    yield ROWS[0]
    raise RuntimeError("the table\\nis locked")
"""


@pytest.fixture
def module(tmp_path, monkeypatch) -> str:
    """The name of a module, without a dot, that only this test can import."""
    name = f"user_source_{os.getpid()}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    (tmp_path / f"{name}_broken.py").write_text("import no_such_package\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


@pytest.fixture(scope="module")
def tokenizer():
    return character_tokenizer(1024)


def load(name, tokenizer, heldout=False, needs="answer", data=None):
    return load_prompts(name, data or DataConfig(), tokenizer, "train", heldout, needs)


@pytest.mark.parametrize("function", ["listed", "yielded"])
@pytest.mark.parametrize("heldout", [False, True])
def test_records_of_a_function_become_prompts_in_its_order(module, tokenizer, function, heldout):
    prompts = load(f"{module}:{function}", tokenizer, heldout)
    assert [(p.text, p.answer) for p in prompts] == [("1+1?", "2"), ("2+5?", "7"), ("user: 3+3?\nassistant: ", "6")]
    assert {p.source for p in prompts} == {f"{module}:{function}"}
    assert prompts[0].response_text == "=2"


def test_ids_are_those_that_the_same_records_have_in_a_file(module, tokenizer, tmp_path):
    file = tmp_path / "set.jsonl"
    file.write_text('{"prompt": "1+1?", "answer": "2"}\n{"prompt": "2+5?", "answer": 7}\n')
    ids = [p.prompt_id for p in load(f"{module}:listed", tokenizer)]
    assert ids == [p.prompt_id for p in load(str(file), tokenizer)] + ["third"]
    assert ids == [p.prompt_id for p in load(f"{module}:yielded", tokenizer)], "the same at every call"


def test_columns_are_those_of_files(module, tokenizer):
    (prompt,) = load(f"{module}:verl", tokenizer)
    assert (prompt.prompt_id, prompt.answer, prompt.source) == ("set/9", "5", "set")
    (prompt,) = load(f"{module}:no_prompt", tokenizer, data=DataConfig(prompt_key="question"))
    assert (prompt.text, prompt.answer) == ("q", "a")
    demonstrations = load(f"{module}:listed", tokenizer, needs="response", data=DataConfig(max_left_out=0.7))
    assert [p.response_text for p in demonstrations] == ["=2"]


def test_records_that_are_no_dicts_are_named_and_left_out(module, tokenizer, caplog):
    assert len(load(f"{module}:mixed", tokenizer, data=DataConfig(max_left_out=0.4))) == 3
    assert f"2 of 5 records left out (2 not a dict: {module}:mixed:0, {module}:mixed:4)" in caplog.text


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        ("nothing", "has no records"),
        ("texts", "none of 2 records can be used (2 not a dict: "),
        ("no_prompt", "data.prompt_key='prompt' is not a column of data.train="),
        ("prompt_is_a_number", "(1 a prompt that is neither a text nor a list of chat messages: "),
        ("none", "failed after 0 records with TypeError: 'NoneType' object is not iterable"),
        ("wants_an_argument", "failed after 0 records with TypeError: wants_an_argument() missing 1 required"),
        ("fails", "failed after 1 records with RuntimeError: the table"),
        ("number", "has no function number"),
        ("missing", "has no function missing"),
    ],
)
def test_a_function_that_cannot_be_used_is_one_sentence(module, tokenizer, function, reason):
    with pytest.raises(ConfigError) as caught:
        load(f"{module}:{function}", tokenizer)
    assert f"data.train='{module}:{function}'" in str(caught.value)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_module_that_cannot_be_imported_names_the_key(module, tokenizer):
    with pytest.raises(ConfigError, match=r"data\.eval='no_such.module:records': importing no_such.module failed with"):
        load("no_such.module:records", tokenizer, heldout=True)
    with pytest.raises(ConfigError, match=r"_broken failed with ModuleNotFoundError: No module named 'no_such_package"):
        load(f"{module}_broken:records", tokenizer)


def test_names_of_data_sets_are_not_taken_for_functions(module, tmp_path, monkeypatch):
    assert is_function("package.module:function") and is_function(f"{module}:listed")
    for name in ("openai/gsm8k:main", "gsm8k_nowhere:main", "a/b.c:d", "arithmetic", "set:train.jsonl", "1.2:x"):
        assert not is_function(name), name
    monkeypatch.chdir(tmp_path)
    (tmp_path / "saved.sets").mkdir()
    assert not is_function("saved.sets:main"), "a folder is a data set"


def test_the_sentence_for_an_unknown_name_mentions_functions():
    with pytest.raises(ConfigError, match="nor a function package.module:function, nor a data set"):
        read_rows("no_such_module:records", "train", Intake("", "data.train", "data.max_left_out", 0.05))
