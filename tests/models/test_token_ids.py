"""What a model's tokenizer, config.json and generation_config.json say of its tokens, reconciled."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from megatron_rl.config import ConfigError
from megatron_rl.models.token_ids import TokenIds, encode_prompts, read_token_ids, state_ends

TEXT, END, TURN, PAD, START = 0, 10, 11, 12, 13
SPECIAL = {"<end>": END, "<turn>": TURN, "<pad>": PAD, "<start>": START}
VOCABULARY = {**{letter: number for number, letter in enumerate("abcdefghi?")}, **SPECIAL}
SIZE = 16
CHAT = "{% for m in messages %}{{ m.content }}<turn>{% endfor %}{% if add_generation_prompt %}a{% endif %}"


def make_tokenizer(**options: Any) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel(VOCABULARY, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    options = {"eos_token": "<end>", "pad_token": "<pad>", "extra_special_tokens": ["<turn>", "<start>"]} | options
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **options)
    tokenizer.chat_template = None
    return tokenizer


def write_configs(folder: Path, config: Any = "absent", generation: Any = "absent") -> Path:
    """Both files with an `eos_token_id`; absent: without the key, or without the file."""
    known = {"vocab_size": SIZE}
    (folder / "config.json").write_text(json.dumps(known if config == "absent" else known | {"eos_token_id": config}))
    if generation != "absent":
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    return folder


def read(folder: Path, tokenizer: PreTrainedTokenizerFast | None = None) -> TokenIds:
    return read_token_ids(folder, tokenizer or make_tokenizer(), SIZE)


@pytest.mark.parametrize(
    ("config", "generation", "ends"),
    [
        (END, END, [END]),
        (END, [TURN, END], [END, TURN]),  # as Qwen's and Llama's chat models have it
        (TURN, "absent", [END, TURN]),
        (None, None, [END]),
        ("absent", "absent", [END]),
        ([END, START], TURN, [END, TURN, START]),
    ],
)
def test_whatever_names_an_end_counts_and_the_tokenizers_comes_first(
    tmp_path: Path, config: Any, generation: Any, ends: list[int]
) -> None:
    tokens = read(write_configs(tmp_path, config, generation))
    assert list(tokens.ends) == ends
    assert tokens.text_end == tokens.turn_end == END
    assert tokens.limit == max(VOCABULARY.values()) + 1


def test_a_line_says_that_the_configurations_name_another_end_than_the_tokenizer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        read(write_configs(tmp_path, TURN, [TURN, START]))
    (line,) = caplog.messages
    assert f"the tokenizer ends a response with {END}" in line
    assert "generation_config.json names 11 and 13 and config.json names 11" in line
    assert "'<end>' (10), '<turn>' (11), '<start>' (13)" in line


def test_files_that_agree_are_not_talked_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        read(write_configs(tmp_path, END, [TURN, END]))
        read(write_configs(tmp_path, None, "absent"))
    assert caplog.messages == []


def test_the_end_of_a_turn_ends_a_response_and_is_imitated_after_messages(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT
    tokens = read(write_configs(tmp_path, END), tokenizer)  # a base model with the template of its chat model
    assert tokens.ends == (END, TURN)
    assert tokens.ended([1, 2], chat=True) == [1, 2, TURN]
    assert tokens.ended([1, 2], chat=False) == [1, 2, END]
    assert tokens.ended([1, TURN], chat=False) == [1, TURN], "an end that the text has already"
    assert tokens.ended([], chat=False) == [END]


@pytest.mark.parametrize("template", ["{% for m in messages %}{{ m.content }}\n{% endfor %}", "{{ missing('x') }}"])
def test_a_template_without_a_special_end_leaves_the_tokenizers(tmp_path: Path, template: str) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    tokens = read(write_configs(tmp_path), tokenizer)
    assert (tokens.ends, tokens.turn_end) == ((END,), END)


def test_a_tokenizer_without_an_end_takes_that_of_the_configurations(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(eos_token=None, extra_special_tokens=["<turn>", "<end>"])
    tokens = read(write_configs(tmp_path, END, [TURN]), tokenizer)
    assert (tokens.ends, tokens.text_end) == ((TURN, END), TURN)


def test_padding_may_be_an_end_or_outside_the_model_but_an_end_may_not(tmp_path: Path) -> None:
    write_configs(tmp_path)
    assert read(tmp_path, make_tokenizer(pad_token="<end>")).padding == END
    outside = make_tokenizer(pad_token="<added>")
    outside.add_special_tokens({"pad_token": "<added>"})
    assert outside.pad_token_id == len(VOCABULARY)
    tokens = read_token_ids(tmp_path, outside, len(VOCABULARY))
    assert (tokens.padding, tokens.limit) == (None, len(VOCABULARY))
    with pytest.raises(ConfigError, match=r"its tokenizer has '<added>' \(14\), but vocab_size=14 in config.json has"):
        read_token_ids(tmp_path, make_tokenizer(pad_token="<added>", eos_token="<added>"), len(VOCABULARY))


def test_added_tokens_without_rows_in_the_model_are_refused_by_name(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<x>", "<y>", "<z>", "<w>"])
    with pytest.raises(
        ConfigError, match=r"has '<x>' \(14\), '<y>' \(15\), '<z>' \(16\) and 1 more, but vocab_size=14"
    ):
        read_token_ids(write_configs(tmp_path), tokenizer, len(VOCABULARY))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (2, "eos_token_id 2, but to the tokenizer that is the ordinary text 'c', at which responses would be cut off"),
        (15, "eos_token_id 15, which can never be sampled: tokenizer and model have the ids 0 to 13"),
        (-1, "eos_token_id -1, which can never be sampled"),
        ([END, 99], "eos_token_id 99, which can never be sampled"),
        ("<end>", "eos_token_id='<end>' is neither a token id nor a list of them"),
        (True, "eos_token_id=True is neither a token id"),
        ([1.5], r"eos_token_id=\[1.5\] is neither a token id"),
    ],
)
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_an_end_that_cannot_be_is_refused(tmp_path: Path, config: Any, message: str, file: str) -> None:
    folder = write_configs(tmp_path, config) if file == "config.json" else write_configs(tmp_path, END, config)
    with pytest.raises(ConfigError, match=f"(?s){file}.*{message}"):
        read(folder)


def test_a_model_that_nothing_ends_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no token ends a response, so all would run to rollout.max_tokens"):
        read(write_configs(tmp_path, None, None), make_tokenizer(eos_token=None))


def test_ids_beyond_a_gap_in_the_vocabulary_can_be_sampled(tmp_path: Path) -> None:
    gap = VOCABULARY | {"<far>": 20}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(gap, unk_token="?")), eos_token="<far>"
    )
    tokens = read_token_ids(write_configs(tmp_path), tokenizer, 32)
    assert len(tokenizer) < 20 < tokens.limit == 21
    assert tokens.ends == (20,)


def test_what_the_tokenizer_adds_comes_once_and_only_in_front() -> None:
    tokenizer = make_tokenizer(bos_token="<start>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", START), ("<end>", END)]
    )
    assert tokenizer("ab")["input_ids"] == [START, 0, 1, END]
    assert encode_prompts(["ab", "<start>ab", ""], tokenizer, chat=False) == [[START, 0, 1], [START, 0, 1], [START]]
    assert encode_prompts(["ab"], tokenizer, chat=True) == [[0, 1]]


def test_an_export_names_every_end(tmp_path: Path) -> None:
    write_configs(tmp_path, TURN, TURN)
    tokens = read(tmp_path)
    assert state_ends(tmp_path, tokens)
    stated = json.loads((tmp_path / "generation_config.json").read_text())
    assert stated == {"eos_token_id": [END, TURN], "pad_token_id": PAD}
    assert not state_ends(tmp_path, read(tmp_path)), "nothing is left to change"


def test_an_export_of_files_that_agree_stays_as_it_is(tmp_path: Path) -> None:
    write_configs(tmp_path, END, [END, TURN])
    before = (tmp_path / "generation_config.json").read_bytes()
    assert not state_ends(tmp_path, read(tmp_path))
    assert (tmp_path / "generation_config.json").read_bytes() == before
