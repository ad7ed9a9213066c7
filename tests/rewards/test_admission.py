"""What a run finds out about its reward before it starts engines."""

import logging
import os
from pathlib import Path

import pytest

from megatron_rl.config import ConfigError
from megatron_rl.config.sections import RewardConfig
from megatron_rl.data.prompts import Prompt
from megatron_rl.rewards import Scorer
from megatron_rl.rewards.admission import readable

USER_MODULE = """
import numpy, time
from decimal import Decimal
from fractions import Fraction

def nothing(prompt, response, answer): pass
def text(prompt, response, answer): return "1.0"
def pair(prompt, response, answer): return 1.0, "fine"
def other_dict(prompt, response, answer): return {"reward": 1.0}
def dict_of_text(prompt, response, answer): return {"score": "high"}
async def coroutine(prompt, response, answer): return 1.0
def vector(prompt, response, answer): return numpy.ones(3)

def verl(prompt, response, answer): return {"score": 1.0, "acc": True}
def true(prompt, response, answer): return True
def scalar(prompt, response, answer): return numpy.float32(0.5)
def decimal(prompt, response, answer): return Decimal("0.5")
def fraction(prompt, response, answer): return Fraction(1, 2)
def zero_dimensional(prompt, response, answer): return numpy.array(0.5)

def two_arguments(prompt, response): return 1.0
def always_fails(prompt, response, answer): raise KeyError("API_KEY")
def fails_once(prompt, response, answer): return 1.0 / (answer != "1")
def judge(prompt, response, answer): return float(response == answer)
"""


def prompts(*answers: str) -> list[Prompt]:
    return [Prompt(f"p{place}", [1], answer, "set", f"question {place}") for place, answer in enumerate(answers)]


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"odd_reward_{os.getpid()}"
    (tmp_path / f"{name}.py").write_text(USER_MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def admitted(reward: RewardConfig, found: list[Prompt], share: float = 0.9) -> list[str]:
    with Scorer(reward, max_tokens=64, workers=1) as scorer:
        return [prompt.prompt_id for prompt in readable(found, scorer, "data.train", "my.jsonl", share)]


@pytest.mark.parametrize(
    ("name", "answers", "kept"),
    [
        ("math", ["5", r"\frac{1}{", r"\$18.90", "2x+", "4.5e33", "8$,$4"], ["p0", "p2", "p4", "p5"]),
        ("numeric", ["5", "none", "#### 72", "1e5"], ["p0", "p2", "p3"]),
        ("choice", ["A", "7", "(B)", "K", "A cat"], ["p0", "p2", "p3"]),
        ("exact", ["A", "", "x"], ["p0", "p1", "p2"]),
    ],
)
def test_references_that_the_reward_cannot_read_are_named_once_and_left_out(
    name: str, answers: list[str], kept: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    reward = RewardConfig.model_validate({"name": name})
    with caplog.at_level(logging.WARNING):
        assert admitted(reward, prompts(*answers)) == kept
    lost = [f"p{place}" for place in range(len(answers)) if f"p{place}" not in kept]
    assert len(caplog.records) == (1 if lost else 0)
    for each in lost:
        assert f"{each} ({answers[int(each[1:])]!r})" in caplog.text
    if lost:
        assert f"{len(lost)} of {len(answers)} records left out" in caplog.text


def test_a_set_without_a_readable_reference_is_refused() -> None:
    with pytest.raises(ConfigError, match="data.train='my.jsonl': none of 2 .* reward.name=numeric cannot read: p0 "):
        admitted(RewardConfig(name="numeric"), prompts("yes", "no"), share=1.0)


def test_no_more_than_the_largest_share_is_left_out() -> None:
    with pytest.raises(ConfigError, match="1 of 2 records cannot be used, and data.max_left_out=0.05 "):
        admitted(RewardConfig(name="numeric"), prompts("yes", "2"), share=0.05)


@pytest.mark.parametrize("name", ["nothing", "text", "pair", "other_dict", "dict_of_text", "coroutine", "vector"])
def test_a_function_that_returns_no_number_fails_at_the_start_on_the_first_record(name: str, module: str) -> None:
    with pytest.raises(ConfigError) as caught:
        admitted(RewardConfig(function=f"{module}:{name}"), prompts("1", "2"))
    assert f"reward.function='{module}:{name}': " in str(caught.value)
    assert "not a number, for the record p0; return a number" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["verl", "true", "scalar", "decimal", "fraction", "zero_dimensional"])
def test_whatever_is_a_number_is_accepted(name: str, module: str) -> None:
    assert admitted(RewardConfig(function=f"{module}:{name}"), prompts("1", "2")) == ["p0", "p1"]


def test_a_function_with_other_arguments_is_refused(module: str) -> None:
    with pytest.raises(ConfigError, match=r"two_arguments does not take \(prompt, response, answer\)"):
        admitted(RewardConfig(function=f"{module}:two_arguments"), prompts("1", "2"))


def test_a_function_that_raises_is_warned_of_at_the_start(module: str, caplog: pytest.LogCaptureFixture) -> None:
    assert admitted(RewardConfig(function=f"{module}:always_fails"), prompts("1", "2")) == ["p0", "p1"]
    assert "fails on the record p1: KeyError" in caplog.text
    assert admitted(RewardConfig(function=f"{module}:fails_once"), prompts("1", "2")) == ["p0", "p1"]
    assert "fails on the record p0: ZeroDivisionError" in caplog.text


def test_a_variable_that_the_import_misses_is_named(
    tmp_path: Path, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f"needs_{module}.py").write_text(
        "import os\nKEY = os.environ['JUDGE_API_KEY']\ndef f(*texts): return 1"
    )
    monkeypatch.setenv("JUDGE_API_KEY", "k")
    with pytest.raises(ConfigError, match="JUDGE_API_KEY; to show it, list it in reward.environment"):
        Scorer(RewardConfig(function=f"needs_{module}:f"), max_tokens=64, workers=1)
    reward = RewardConfig(function=f"needs_{module}:f", environment=["JUDGE_API_KEY"])
    assert admitted(reward, prompts("1")) == ["p0"]
