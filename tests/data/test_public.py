"""Public sets, read from local files shaped like them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.config import ConfigError
from megatron_rl.config.heldout_sets import PUBLIC_SETS
from megatron_rl.config.sections import DataConfig
from megatron_rl.data import load_prompts
from megatron_rl.data.intake import Intake
from megatron_rl.data.public import DAPO_BEGINNING, DAPO_ENDING, EURUS_ENDING, EVALUATION, TRAINING, Problem, PublicSet
from megatron_rl.data.public import read_problems as problems_by_place
from megatron_rl.data.rows import read_rows
from megatron_rl.models.scratch import character_tokenizer
from megatron_rl.rewards.builtin import BUILTIN

EVALUATION_ROWS: dict[str, tuple[dict[str, Any], str, str]] = {
    "gsm8k": ({"question": "How many?", "answer": "3*24=<<3*24=72>>72\n#### 72"}, "How many?", "72"),
    "math500": (
        {"problem": "What is $x$?", "solution": "...", "answer": r"\frac{1}{2}"},
        "What is $x$?",
        r"\frac{1}{2}",
    ),
    "amc23": ({"id": 0, "question": "At noon", "answer": "27.0", "url": "u"}, "At noon", "27.0"),
    "aime24": ({"id": 60, "problem": "Every morning", "answer": "204", "year": "2024"}, "Every morning", "204"),
    "aime25": ({"problem": "Find the sum", "answer": 70, "id": "0"}, "Find the sum", "70"),
    "minerva": ({"question": "Each of the two", "answer": "1.6e-19"}, "Each of the two", "1.6e-19"),
    "olympiadbench": (
        {"question": "Determine", "final_answer": ["$2$", "$3$"], "modality": "Text-only"},
        "Determine",
        "2, 3",
    ),
    "mmlu_stem": (
        {"question": "Which?", "choices": ["red", "green", "blue", "none"], "answer": 2, "subject": "astronomy"},
        "Which?\n\nA. red\nB. green\nC. blue\nD. none",
        "C",
    ),
}


def message(text: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": "Think."}, {"role": "user", "content": text}]


TRAINING_ROWS: dict[str, tuple[dict[str, Any], str, str]] = {
    "gsm8k": EVALUATION_ROWS["gsm8k"],
    "deepmath": ({"question": "Evaluate", "final_answer": "0", "difficulty": 4.5, "topic": "t"}, "Evaluate", "0"),
    "simplerl": ({"prompt": "...", "extra_info": {"question": "If $x$", "answer": "17"}}, "If $x$", "17"),
    "eurus": (
        {"prompt": message("\nSolve" + EURUS_ENDING), "ability": "math", "reward_model": {"ground_truth": "5"}},
        "Solve",
        "5",
    ),
    "dapo-math": (
        {"prompt": message(DAPO_BEGINNING + "In triangle" + DAPO_ENDING), "reward_model": {"ground_truth": "34"}},
        "In triangle",
        "34",
    ),
}


def jsonl(folder: Path, *rows: dict[str, Any]) -> str:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def read_problems(spec: str, sets: Mapping[str, PublicSet], key: str, max_left_out: float = 0.05) -> list[Problem]:
    intake = Intake(spec, key, "data.max_left_out", max_left_out)
    problems = problems_by_place(spec, sets, intake)
    intake.conclude()
    return list(problems.values())


def test_the_config_knows_the_names_of_all_sets() -> None:
    assert tuple(EVALUATION) == PUBLIC_SETS == tuple(EVALUATION_ROWS)
    assert set(TRAINING) == set(TRAINING_ROWS)


@pytest.mark.parametrize("name", EVALUATION_ROWS)
def test_rows_of_every_evaluation_set_are_understood(name: str, tmp_path: Path) -> None:
    row, text, answer = EVALUATION_ROWS[name]
    (problem,) = read_problems(f"{name}={jsonl(tmp_path, row)}", EVALUATION, "data.eval")
    assert (problem.index, problem.text, problem.answer) == (0, text, answer)


@pytest.mark.parametrize("name", TRAINING_ROWS)
def test_rows_of_every_training_set_are_understood(name: str, tmp_path: Path) -> None:
    row, text, answer = TRAINING_ROWS[name]
    (problem,) = read_problems(f"{name}={jsonl(tmp_path, row)}", TRAINING, "NAME")
    assert (problem.text, problem.answer) == (text, answer)


@pytest.mark.parametrize("name", EVALUATION_ROWS)
def test_its_own_reward_accepts_the_answer_of_every_set(name: str) -> None:
    _, _, answer = EVALUATION_ROWS[name]
    reward = BUILTIN[EVALUATION[name].reward]
    assert reward("", f"So it is \\boxed{{{answer}}}.", answer) == 1.0
    assert reward("", "So it is \\boxed{\\text{(A)} 12345}.", answer) == 0.0


def test_rows_of_another_kind_are_left_out_and_broken_ones_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good, _, _ = TRAINING_ROWS["eurus"]
    file = jsonl(tmp_path, good | {"ability": "code"}, good | {"reward_model": {}}, good, good | {"prompt": []})
    problems = read_problems(f"eurus={file}", TRAINING, "NAME", max_left_out=0.5)
    assert [problem.index for problem in problems] == [2]
    assert "2 of 4 records left out" in caplog.text
    assert "no problem or answer as in PRIME-RL/Eurus-2-RL-Data: " in caplog.text
    assert "rows.jsonl:2" in caplog.text and "rows.jsonl:4" in caplog.text and "rows.jsonl:1" not in caplog.text


def test_a_file_of_another_shape_is_one_sentence(tmp_path: Path) -> None:
    file = jsonl(tmp_path, {"problem": "a", "answer": "b"})
    with pytest.raises(ConfigError, match=r"lacks the column question of openai/gsm8k:main; it has answer, problem\."):
        read_problems(f"gsm8k={file}", EVALUATION, "data.eval")
    with pytest.raises(ConfigError, match="there are gsm8k, math500"):
        read_problems("gsm9k", EVALUATION, "data.eval")


def test_a_public_set_is_put_to_the_model_by_its_template(tmp_path: Path) -> None:
    tokenizer = character_tokenizer(1024)
    spec = f"gsm8k={jsonl(tmp_path, EVALUATION_ROWS['gsm8k'][0])}"
    (prompt,) = load_prompts(spec, DataConfig(), tokenizer, "test", heldout=True)
    assert prompt.text.startswith("user: How many?\n\nPlease reason step by step")
    assert prompt.text.endswith("\\boxed{}.\nassistant: ")
    assert (prompt.prompt_id, prompt.answer, prompt.source) == ("gsm8k/0", "72", "gsm8k")
    tokenizer.chat_template = None
    data = DataConfig(templates={"gsm8k": "Q: {problem}\nA:"})
    (prompt,) = load_prompts(spec, data, tokenizer, "test", heldout=True)
    assert prompt.text == "Q: How many?\nA:"


def test_a_file_within_a_data_set_can_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set" / "hard").mkdir(parents=True)
    (tmp_path / "set" / "easy.jsonl").write_text('{"a": 1}\n')
    (tmp_path / "set" / "hard" / "train.jsonl").write_text('{"a": 2}\n{"a": 3}\n')
    name = f"{tmp_path / 'set'}:hard/train.jsonl"
    rows = read_rows(name, "train", Intake(name, "data.train", "data.max_left_out", 0.05))
    assert [row for _, row in rows] == [{"a": 2}, {"a": 3}]


def test_a_public_set_that_cannot_be_fetched_says_how_to_give_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"'math-ai/aime25' .*Without a network, give a local copy: aime25=FILE\.$"):
        read_problems("aime25", EVALUATION, "data.eval")
