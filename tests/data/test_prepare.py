"""Preparation of training data: duplicates and overlaps go, what is left can be trained on."""

import io
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from rich.console import Console as Terminal

from megatron_rl.config import ConfigError
from megatron_rl.config.sections import DataConfig
from megatron_rl.data import load_prompts
from megatron_rl.data.decontamination import OverlapIndex, tokens
from megatron_rl.data.prepare import deduplicate, overlaps_file, prepare
from megatron_rl.data.public import Problem
from megatron_rl.models.scratch import character_tokenizer
from megatron_rl.observability.console import Console

LONG = "A train leaves the station at noon and travels at sixty miles per hour for exactly three hours"


def jsonl(folder: Path, name: str, rows: list[dict[str, Any]]) -> str:
    file = folder / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.fixture
def run(tmp_path: Path):
    """Prepare these (question, answer) pairs against these evaluation problems; returns output file and messages."""

    def run(pairs: list[tuple[str, str]], heldout: list[str], **options: Any) -> tuple[Path, str]:
        rows = [{"question": text, "final_answer": answer} for text, answer in pairs]
        spec = "deepmath=" + jsonl(tmp_path, "train.jsonl", rows)
        against = []
        if heldout:
            rows = [{"problem": text, "answer": "1"} for text in heldout]
            against = ["math500=" + jsonl(tmp_path, "heldout.jsonl", rows)]
        text = io.StringIO()
        settings = {"ngram": 13, "keep_overlaps": False, "template": None, "max_left_out": 0.05} | options
        output = tmp_path / "out" / "train.parquet"
        prepare(spec, output, against, **settings, console=Console(True, Terminal(file=text)))
        return output, text.getvalue()

    return run


def problems(file: Path) -> list[str]:
    return [row["problem"] for row in pyarrow.parquet.read_table(file).to_pylist()]


def test_duplicates_and_contradictions_go(run) -> None:
    output, said = run(
        [("What is 1 + 1?", "2"), ("what is  1 + 1?", "2"), ("Odd?", "3"), ("Odd?", "4"), ("New", "5")], []
    )
    assert problems(output) == ["What is 1 + 1?", "New"]
    assert "2 of 5 problems; left out 1 duplicates and 2 with contradictory answers" in said


def test_problems_that_differ_in_an_operator_are_not_duplicates() -> None:
    unique, duplicates, contradictory = deduplicate([Problem(0, "1 + 2", "3"), Problem(1, "1 - 2", "-1")])
    assert (len(unique), duplicates, contradictory) == (2, 0, 0)


def test_problems_of_an_evaluation_set_go_and_are_listed(run) -> None:
    pairs = [
        (LONG.upper() + " -- how far?", "180"),
        ("How far is it?", "3"),
        ("Compute $1+2$.", "3"),
        ("Compute 1-2", "-1"),
    ]
    output, said = run(pairs, [LONG + ". Find the distance.", "compute \\(1 + 2\\)"])
    assert problems(output) == ["How far is it?", "Compute 1-2"]
    assert "2 overlap with math500 (13-grams) and were left out" in said
    listed = [json.loads(line) for line in overlaps_file(output).read_text().splitlines()]
    assert [(row["index"], row["overlaps_with"]) for row in listed] == [(0, "math500/0"), (2, "math500/1")]
    assert listed[1]["shared"] == "compute 1 + 2"


def test_overlaps_can_be_kept_and_shorter_ones_found(run) -> None:
    pairs = [(LONG, "180"), ("The station at noon is closed", "0")]
    output, said = run(pairs, [LONG], keep_overlaps=True, ngram=4)
    assert problems(output) == [text for text, _ in pairs]
    assert "2 overlap" in said and "were kept" in said


def test_what_was_prepared_can_be_trained_on(run) -> None:
    output, _ = run([("What is 1 + 1?", "2")], [], template="{problem} Think.")
    tokenizer = character_tokenizer(1024)
    (prompt,) = load_prompts(str(output), DataConfig(), tokenizer, "train", heldout=False)
    assert prompt.text == "user: What is 1 + 1? Think.\nassistant: "
    assert (prompt.prompt_id, prompt.answer, prompt.source) == ("deepmath/0", "2", "deepmath")
    tokenizer.chat_template = None
    (prompt,) = load_prompts(str(output), DataConfig(prompt_key="problem"), tokenizer, "train", heldout=False)
    assert prompt.text == "What is 1 + 1?"


def test_mistakes_are_one_sentence(run, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing is left"):
        run([(LONG, "1")], [LONG])
    run([("a", "1")], [])
    with pytest.raises(ConfigError, match="exists already"):
        run([("a", "1")], [])
    with pytest.raises(ConfigError, match="has no {problem}"):
        (tmp_path / "out" / "train.parquet").unlink()
        run([("a", "1")], [], template="Think.")
    console = Console(False)
    with pytest.raises(ConfigError, match="not a public training set; there are gsm8k, deepmath"):
        prepare("gsm9k", tmp_path / "a.parquet", [], 13, False, None, 0.05, console)
    with pytest.raises(ConfigError, match=r"must end in \.parquet"):
        prepare("gsm8k", tmp_path / "a.json", [], 13, False, None, 0.05, console)
    with pytest.raises(ConfigError, match="'aime23' is not an evaluation set"):
        prepare("gsm8k", tmp_path / "a.parquet", ["aime23"], 13, False, None, 0.05, console)


def test_tokens_ignore_how_mathematics_is_typeset() -> None:
    assert tokens(r"Let $f(x) = \frac{1}{2}x$.") == tokens(r"let f(x)=\frac{ 1 }{ 2 } x")
    assert tokens("1+2") != tokens("1-2")


def test_texts_shorter_than_an_n_gram_overlap_with_their_equal_only() -> None:
    index = OverlapIndex(5)
    index.add([("set/0", "what is 3 + 4"), ("set/1", "what is 3 * 4 ?"), ("set/2", "!")])
    assert index.find("What is 3 + 4?") == ("set/0", "what is 3 + 4")
    assert index.find("what is 3 +") is None
    assert index.find("now what is 3 * 4") == ("set/1", "what is 3 * 4")
    assert index.find("") is None
