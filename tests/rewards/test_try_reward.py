"""`megatron-rl rewards FILE`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rl.config import ConfigError
from megatron_rl.config.sections import RewardConfig
from megatron_rl.rewards.try_reward import reward_config, try_reward
from tests.launching import ROOT

RECORDS = [
    {"prompt": "2+3?", "response": r"So \boxed{5}. I put it inside \boxed{}", "answer": "5", "id": "sum"},
    {"response": r"\boxed{2}", "answer": "-1$,$2$,$-2"},
    {"response": "I do not know", "answer": 7},
    {"response": r"\boxed{3}", "answer": r"\frac{1}{"},
    {"response": None, "answer": "7"},
]


def written(tmp_path: Path) -> Path:
    file = tmp_path / "tried.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return file


def test_each_response_is_shown_as_it_was_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    tried = try_reward(written(tmp_path), reward_config("math", 10.0, []), tmp_path / "out.jsonl")
    assert [each.score for each in tried] == [1.0, 0.0, 0.0, 0.0]
    assert (tried[0].record, tried[0].expected, tried[0].found, tried[0].why) == ("sum", "5", "5", "the same text")
    assert (tried[1].expected, tried[1].found, tried[1].why) == ("-1 , 2 , -2", "2", "different")
    assert (tried[2].expected, tried[2].found) == ("7", None)
    assert "cannot be parsed" in tried[3].why
    assert [json.loads(line)["score"] for line in (tmp_path / "out.jsonl").read_text().splitlines()] == [1, 0, 0, 0]
    assert "tried.jsonl:5" in caplog.text
    assert "4 responses, mean score 0.250" in capsys.readouterr().out


def test_the_command_tries_functions_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "lengths.py").write_text("def score(prompt, response, answer): return len(response) / 10")
    command = [sys.executable, "-m", "megatron_rl.cli", "rewards", str(written(tmp_path)), "--reward", "lengths:score"]
    done = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "0.9" in done.stdout


@pytest.mark.parametrize("name", ["maths", "module.function", "a b:c"])
def test_a_name_that_is_no_reward_is_a_config_error(name: str) -> None:
    with pytest.raises(ConfigError, match="--reward="):
        reward_config(name, 1.0, [])


def test_a_file_without_usable_records_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="FILE=.* must be a .jsonl or .parquet file"):
        try_reward(tmp_path / "missing.jsonl", RewardConfig(name="numeric"))
    (tmp_path / "empty.jsonl").write_text('{"prompt": "p"}\n')
    with pytest.raises(ConfigError, match="none of 1 records can be used .*without a response or an answer"):
        try_reward(tmp_path / "empty.jsonl", RewardConfig(name="numeric"))
