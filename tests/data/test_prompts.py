import json
import logging

import pyarrow
import pyarrow.parquet
import pytest

from megatron_rl.config import ConfigError
from megatron_rl.config.sections import ArithmeticConfig, DataConfig
from megatron_rl.data import load_prompts
from megatron_rl.models.scratch import character_tokenizer

DATA = DataConfig(max_prompt_tokens=40, arithmetic=ArithmeticConfig(train_size=50, eval_size=20))

TOLERANT = DataConfig(max_prompt_tokens=40, max_left_out=1)


@pytest.fixture(scope="module")
def tokenizer():
    return character_tokenizer(1024)


def _jsonl(folder, rows, name="set.jsonl"):
    file = folder / name
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(file)


def _load(name, tokenizer, data=DATA, split="train", heldout=False, needs="answer"):
    return load_prompts(name, data, tokenizer, split, heldout, needs)


def test_plain_columns_in_jsonl_and_parquet_give_the_same_prompts(tmp_path, tokenizer):
    rows = [{"prompt": "1+1?", "answer": "2", "response": "=2"}, {"prompt": "2+5?", "answer": 7, "response": "=7"}]
    jsonl = _load(_jsonl(tmp_path, rows), tokenizer)
    rows[1]["answer"] = "7"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "set.parquet")
    parquet = _load(str(tmp_path / "set.parquet"), tokenizer)
    for prompts in (jsonl, parquet):
        assert [(p.text, p.answer, p.response_text) for p in prompts] == [("1+1?", "2", "=2"), ("2+5?", "7", "=7")]
        assert prompts[0].token_ids == tokenizer.encode("1+1?")
    assert [p.prompt_id for p in jsonl] == [p.prompt_id for p in parquet]
    assert jsonl[0].source.endswith("set.jsonl")


def test_column_names_are_configurable(tmp_path, tokenizer):
    data = DataConfig(prompt_key="question", answer_key="gold", response_key="worked")
    (prompt,) = _load(_jsonl(tmp_path, [{"question": "q", "gold": "a", "worked": "w"}]), tokenizer, data)
    assert (prompt.text, prompt.answer, prompt.response_text) == ("q", "a", "w")


def test_chat_messages_go_through_the_chat_template(tmp_path, tokenizer):
    messages = [{"role": "system", "content": "add"}, {"role": "user", "content": "1+1?"}]
    (prompt,) = _load(_jsonl(tmp_path, [{"prompt": messages, "answer": "2"}]), tokenizer)
    assert prompt.text == "system: add\nuser: 1+1?\nassistant: "
    assert tokenizer.decode(prompt.token_ids) == prompt.text


def test_chat_messages_without_a_template_are_an_error(tmp_path):
    plain = character_tokenizer(1024)
    plain.chat_template = None
    name = _jsonl(tmp_path, [{"prompt": [{"role": "user", "content": "1+1?"}], "answer": "2"}])
    with pytest.raises(ConfigError, match="no chat template"):
        _load(name, plain)


def test_verl_layout_is_recognised(tmp_path, tokenizer):
    def row(i, truth):
        return {
            "data_source": "openai/gsm8k",
            "prompt": [{"role": "user", "content": f"question {i}"}],
            "reward_model": {"style": "rule", "ground_truth": truth},
            "extra_info": {"index": i, "split": "train"},
        }

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row(5, "72"), row(9, "10")]), tmp_path / "gsm.parquet")
    prompts = _load(str(tmp_path / "gsm.parquet"), tokenizer)
    assert [(p.prompt_id, p.answer, p.source) for p in prompts] == [
        ("openai/gsm8k/5", "72", "openai/gsm8k"),
        ("openai/gsm8k/9", "10", "openai/gsm8k"),
    ]
    (listed,) = _load(_jsonl(tmp_path, [row(1, ["a", "b"])]), tokenizer)
    assert json.loads(listed.answer) == ["a", "b"]


def test_broken_lines_are_named_and_left_out(tmp_path, tokenizer, caplog):
    good = {"prompt": "1+1?", "answer": "2"}
    name = _jsonl(tmp_path, [good, '{"prompt": "1', "", "[1]", {"prompt": 3, "answer": "2"}, {"prompt": "x"}, good])
    with caplog.at_level(logging.WARNING):
        prompts = _load(name, tokenizer, TOLERANT)
    assert len(prompts) == 2
    assert (
        f"4 of 6 records left out (2 not a JSON object: {name}:2, {name}:4; 1 a prompt that is neither" in caplog.text
    )
    assert f"{name}:5; 1 no answer: {name}:6)" in caplog.text


def test_many_broken_lines_are_counted_beyond_the_first_ten(tmp_path, tokenizer, caplog):
    with caplog.at_level(logging.WARNING):
        _load(_jsonl(tmp_path, ["{"] * 25 + [{"prompt": "p", "answer": "a"}]), tokenizer, TOLERANT)
    assert "25 of 26" in caplog.text
    assert caplog.text.rstrip().endswith("set.jsonl:10 and 15 more)")


def test_nothing_but_broken_lines_is_an_error(tmp_path, tokenizer):
    with pytest.raises(ConfigError, match=r"data\.train=.*none of 2 records can be used \(2 not a JSON object"):
        _load(_jsonl(tmp_path, ["{", "]"]), tokenizer)
    with pytest.raises(ConfigError, match="neither a text nor a list of chat messages"):
        _load(_jsonl(tmp_path, [{"prompt": 1, "answer": "2"}]), tokenizer)
    with pytest.raises(ConfigError, match="has no records"):
        _load(_jsonl(tmp_path, []), tokenizer)


def test_invalid_utf8_is_a_broken_line(tmp_path, tokenizer, caplog):
    file = tmp_path / "set.jsonl"
    file.write_bytes(b'{"prompt": "1+1?", "answer": "2"}\n{"prompt": "\xff\xfe", "answer": "2"}\n')
    assert len(_load(str(file), tokenizer, TOLERANT)) == 1
    assert "1 not UTF-8 text: " in caplog.text and "set.jsonl:2" in caplog.text


@pytest.mark.parametrize(
    ("row", "needs", "message"),
    [
        ({"question": "q", "answer": "a"}, "answer", r"data\.prompt_key='prompt'.*it has answer, question"),
        ({"prompt": "q", "solution": "a"}, "answer", r"data\.answer_key='answer'.*it has prompt, solution"),
        ({"prompt": "q", "answer": "a"}, "response", r"data\.response_key='response'.*it has answer, prompt"),
    ],
)
def test_a_missing_column_names_the_key_and_the_columns(tmp_path, tokenizer, row, needs, message):
    with pytest.raises(ConfigError, match=message):
        _load(_jsonl(tmp_path, [row]), tokenizer, needs=needs)


def test_demonstrations_need_no_answer(tmp_path, tokenizer):
    (prompt,) = _load(_jsonl(tmp_path, [{"prompt": "q", "response": "r"}]), tokenizer, needs="response")
    assert (prompt.response_text, prompt.answer) == ("r", "")


def test_long_prompts_are_left_out_with_a_count(tmp_path, tokenizer, caplog):
    rows = [{"prompt": "x" * n, "answer": "a"} for n in (40, 41, 5, 90)]
    with caplog.at_level(logging.WARNING):
        prompts = _load(_jsonl(tmp_path, rows), tokenizer)
    assert [len(p.token_ids) for p in prompts] == [40, 5]
    assert "2 of 4 prompts left out" in caplog.text
    with pytest.raises(ConfigError, match=r"no usable prompt.*max_prompt_tokens=40"):
        _load(_jsonl(tmp_path, rows[1:2]), tokenizer)


def test_ids_come_from_a_column_or_from_the_content(tmp_path, tokenizer):
    named = [{"id": 7, "prompt": "a", "answer": "1"}, {"prompt_id": "b7", "prompt": "b", "answer": "1"}]
    assert [p.prompt_id for p in _load(_jsonl(tmp_path, named), tokenizer)] == ["7", "b7"]
    rows = [{"prompt": text, "answer": "1"} for text in ("a", "b", "c")]
    ids = {p.text: p.prompt_id for p in _load(_jsonl(tmp_path, rows), tokenizer)}
    assert len(set(ids.values())) == 3
    # Stable under reordering and removal of other rows.
    assert {p.text: p.prompt_id for p in _load(_jsonl(tmp_path, rows[:0:-1]), tokenizer)} == {
        text: ids[text] for text in ("b", "c")
    }


def test_equal_ids_are_made_unique(tmp_path, tokenizer):
    rows = [{"id": name, "prompt": f"p{i}", "answer": "1"} for i, name in enumerate(["a", "a", "a-2", "a", "b"])]
    ids = [p.prompt_id for p in _load(_jsonl(tmp_path, rows), tokenizer)]
    assert ids == ["a", "a-2", "a-2-2", "a-3", "b"]
    same = [{"prompt": "p", "answer": "1"}] * 3
    assert len({p.prompt_id for p in _load(_jsonl(tmp_path, same), tokenizer)}) == 3


def test_files_that_cannot_be_read_are_one_sentence(tmp_path, tokenizer):
    with pytest.raises(ConfigError, match=r"data\.eval=.*does not exist"):
        _load(str(tmp_path / "none.jsonl"), tokenizer, heldout=True)
    (tmp_path / "bad.parquet").write_bytes(b"nonsense")
    with pytest.raises(ConfigError, match="not a readable Parquet file"):
        _load(str(tmp_path / "bad.parquet"), tokenizer)
    (tmp_path / "set.csv").write_text("a,b\n")
    with pytest.raises(ConfigError, match=r"must be a \.jsonl or \.parquet file"):
        _load(str(tmp_path / "set.csv"), tokenizer)


def test_a_data_set_that_cannot_be_loaded_is_one_sentence(tmp_path, tokenizer, monkeypatch):
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"data\.train='nobody/nothing'") as caught:
        _load("nobody/nothing", tokenizer)
    assert "\n" not in str(caught.value)
    assert "'train'" in str(caught.value)


def test_a_datasets_folder_is_read_with_its_split(tmp_path, tokenizer):
    folder = tmp_path / "hub"
    folder.mkdir()
    _jsonl(folder, [{"prompt": "1+1?", "answer": "2"}], "train.jsonl")
    _jsonl(folder, [{"prompt": "2+2?", "answer": "4"}, {"prompt": "3+3?", "answer": "6"}], "test.jsonl")
    assert [p.text for p in _load(str(folder), tokenizer)] == ["1+1?"]
    assert [p.text for p in _load(str(folder), tokenizer, split="test")] == ["2+2?", "3+3?"]
    with pytest.raises(ConfigError, match="split 'dev'"):
        _load(str(folder), tokenizer, split="dev")


def test_arithmetic_sets(tokenizer):
    train = _load("arithmetic", tokenizer)
    heldout = _load("arithmetic-heldout", tokenizer, heldout=True)
    assert (len(train), len(heldout)) == (50, 20)
    assert train[3].prompt_id == "arithmetic/3"
    assert heldout[0].prompt_id == "arithmetic-heldout/0"
    assert all(p.response_text.endswith(p.answer) for p in train)
    assert tokenizer.unk_token_id not in [token for p in train for token in tokenizer.encode(p.text + p.response_text)]


def _lines(count, *more):
    return [{"prompt": f"{i}+1?", "answer": str(i)} for i in range(count)] + list(more)


BROKEN = {
    "surrogate": '{"prompt": "\\ud83d", "answer": "1"}',
    "null content": {"prompt": [{"role": "user", "content": None}], "answer": "1"},
    "an image": {"prompt": [{"role": "user", "content": [{"type": "image", "url": "u"}]}], "answer": "1"},
    "refused by the template": {"prompt": [{"role": "refused", "content": "a"}], "answer": "1"},
    "deep": '{"prompt": ' + "[" * 100_000,
    "deep but JSON": '{"answer": "1", "prompt": ' + "[" * 400 + "]" * 400 + "}",
    "NaN": '{"prompt": "a", "answer": NaN}',
    "infinite": '{"prompt": "a", "answer": -Infinity}',
    "empty": {"prompt": "a", "answer": " "},
    "null": {"prompt": "a", "answer": None},
    "role": {"prompt": [{"role": 7, "content": "a"}], "answer": "1"},
    "id": '{"prompt": "a", "answer": "1", "id": "\\udc00"}',
    "source": '{"prompt": "a", "answer": "1", "data_source": "\\udc00"}',
    "truth": '{"prompt": "a", "answer": "1", "reward_model": {"ground_truth": "\\udc00"}}',
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_record_ends_no_run(tmp_path, kind, caplog):
    tokenizer = character_tokenizer(1024)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ raise_exception('no') if m.role == 'refused' else m.content }}{% endfor %}"
    )
    name = _jsonl(tmp_path, _lines(19, BROKEN[kind]))
    assert [p.answer for p in _load(name, tokenizer)] == [str(i) for i in range(19)]
    assert "1 of 20 records left out (1 " in caplog.text and f"{name}:20)" in caplog.text
    with pytest.raises(
        ConfigError, match=r"1 of 20 records cannot be used, and data\.max_left_out=0\.04 is the largest"
    ):
        _load(name, tokenizer, DataConfig(max_left_out=0.04))


def test_long_prompts_are_no_broken_records(tmp_path, tokenizer):
    rows = _lines(1, *({"prompt": "x" * 41, "answer": "a"} for _ in range(30)))
    assert len(_load(_jsonl(tmp_path, rows), tokenizer, DataConfig(max_prompt_tokens=40, max_left_out=0))) == 1


def test_long_demonstrations_are_left_out_with_a_count(tmp_path, tokenizer, caplog):
    name = _jsonl(tmp_path, [{"prompt": "p", "response": "r" * n} for n in (8, 9, 3)])
    prompts = load_prompts(name, DATA, tokenizer, "train", False, "response", max_tokens=10)
    assert [(len(p.token_ids), len(p.response_ids)) for p in prompts] == [(1, 8), (1, 3)], "and the end of the sequence"
    assert "1 of 3 prompts left out (longer than data.max_prompt_tokens=40, or than 10 tokens with the" in caplog.text
    with pytest.raises(ConfigError, match="of 3 records, 3 are longer than"):
        load_prompts(name, DATA, tokenizer, "train", False, "response", max_tokens=4)


def test_only_the_column_that_is_needed_can_break_a_record(tmp_path, tokenizer):
    rows = ['{"prompt": "a", "answer": NaN, "response": "r"}', '{"prompt": "b", "answer": "1", "response": ["x"]}']
    (prompt,) = _load(_jsonl(tmp_path, rows[:1]), tokenizer, needs="response")
    assert (prompt.answer, prompt.response_ids) == ("", tokenizer.encode("r"))
    (prompt,) = _load(_jsonl(tmp_path, rows[1:]), tokenizer)
    assert (prompt.answer, prompt.response_text, prompt.response_ids) == ("1", None, None)


def test_demonstrations_as_messages_are_imitated_as_the_text_of_the_assistant(tmp_path, tokenizer):
    trl = {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}
    data = DataConfig(response_key="completion")
    (prompt,) = _load(_jsonl(tmp_path, [trl]), tokenizer, data, needs="response")
    assert (prompt.text, prompt.response_text) == ("user: a\nassistant: ", "b")
    assert prompt.response_ids == tokenizer.encode("b")


def test_verl_columns_may_be_json_text(tmp_path, tokenizer):
    row = {
        "prompt": json.dumps([{"role": "user", "content": "a"}]),
        "reward_model": json.dumps({"style": "rule", "ground_truth": 72}),
        "extra_info": json.dumps({"index": 3}),
        "data_source": "s",
    }
    (prompt,) = _load(_jsonl(tmp_path, [row]), tokenizer)
    assert (prompt.text, prompt.answer, prompt.prompt_id) == ("user: a\nassistant: ", "72", "s/3")


def test_a_table_of_pandas_gives_the_prompts_of_the_records_it_was_made_of(tmp_path, tokenizer):
    import numpy as np
    import pandas

    chat = [{"role": "user", "content": "a"}]
    records = [
        {"id": 1, "prompt": chat, "answer": "4.50", "data_source": "s"},
        {"prompt": chat, "answer": "5"},
    ]
    frame = pandas.DataFrame(records)
    frame["prompt"] = [np.array(chat, dtype=object)] * 2
    frame.to_parquet(tmp_path / "set.parquet")
    prompts = _load(str(tmp_path / "set.parquet"), tokenizer)
    assert [p.answer for p in prompts] == ["4.50", "5"]
    assert prompts[0].prompt_id == "1", "although pandas makes floats of integers where some are missing"
    assert prompts[1].prompt_id == _load(_jsonl(tmp_path, records[1:]), tokenizer)[0].prompt_id


def test_ids_do_not_depend_on_what_is_left_out(tmp_path, tokenizer):
    rows = [{"id": "a", "prompt": "p", "answer": "1"}] * 2
    spoiled = {"id": "a", "prompt": [{"role": "user", "content": "\t"}], "answer": "1"}
    ids = [p.prompt_id for p in _load(_jsonl(tmp_path, [*rows, spoiled, *rows]), tokenizer, TOLERANT)]
    assert ids == ["a", "a-2", "a-3", "a-4"]


def test_one_text_that_the_tokenizer_refuses_costs_no_other(tmp_path):
    tokenizer = character_tokenizer(1024)

    class Refusing:
        """Fails on whatever holds a zero, as tokenizers do on what they cannot take."""

        chat_template = None

        def __call__(self, texts, **settings):
            if any("0" in text for text in ([texts] if isinstance(texts, str) else texts)):
                raise OverflowError("cannot take a zero")
            return tokenizer(texts, **settings)

    prompts = _load(_jsonl(tmp_path, _lines(25)), Refusing(), TOLERANT)
    assert [p.answer for p in prompts] == [str(i) for i in range(25) if "0" not in str(i)]
