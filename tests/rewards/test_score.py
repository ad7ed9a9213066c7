import logging
import os
import subprocess
import sys
import time

import pytest

from megatron_rl.config import ConfigError
from megatron_rl.config.sections import LengthPenaltyConfig, RewardConfig
from megatron_rl.rewards import ScoreItem, Scorer

USER_MODULE = """
import ctypes, os, re, sys, time

def score(prompt, response, answer):
    print("chatter that must not be taken for a reply")
    if response == "raise":
        raise RuntimeError("two\\nlines")
    if response == "loop":
        while True:
            pass
    if response == "hold the GIL":  # sleeps inside a C call that never gives the GIL up
        ctypes.PyDLL(None).usleep(10_000_000)
    if response == "die":
        os._exit(3)
    if response == "exit":
        sys.exit("bye")
    if response in ("nan", "inf"):
        return float(response)
    if response == "text":
        return "1.0"
    if response == "nothing":
        return None
    if response == "true":
        return True
    if response == "modules":
        return float("torch" in sys.modules)
    if response == "pid":
        return float(os.getpid())
    return 0.25

value = 3
"""


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    name = f"user_reward_{os.getpid()}"
    (tmp_path / f"{name}.py").write_text(USER_MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def _item(response, record_id="r0", length=10, answer="4"):
    return ScoreItem("2+2?", response, answer, length, record_id)


def test_builtin_rewards_score_in_order():
    with Scorer(RewardConfig(name="numeric"), max_tokens=64) as scorer:
        scores = scorer.score([_item("=4"), _item("=5"), _item("4,0=4")])
    assert [score.value for score in scores] == [1.0, 0.0, 1.0]


def test_inline_reward_that_raises_counts_zero_and_names_the_record(caplog):
    with Scorer(RewardConfig(name="numeric"), max_tokens=64) as scorer:
        scores = scorer.score([_item("=4", answer="none", record_id="train/17"), _item("=4")])
        assert [score.value for score in scores] == [0.0, 1.0]
        assert "has no number" in scores[0].error
        assert "train/17" in caplog.text
        assert scorer.metrics() == {"errors": 1.0, "timeouts": 0.0}
        assert scorer.metrics() == {"errors": 0.0, "timeouts": 0.0}


def test_the_length_penalty_is_added():
    reward = RewardConfig(name="numeric", length_penalty=LengthPenaltyConfig(start=32, coef=0.5))
    with Scorer(reward, max_tokens=64) as scorer:
        scores = scorer.score([_item("=4", length=32), _item("=4", length=48), _item("=5", length=64)])
    assert [score.total for score in scores] == [1.0, 0.75, -0.5]
    assert [score.value for score in scores] == [1.0, 1.0, 0.0]


def test_failing_rewards_count_zero_and_the_others_are_unharmed(user_module, caplog):
    bad = {
        "raise": "RuntimeError: two lines",
        "die": "exit code 3",
        "exit": "exit code 1",
        "nan": "nan",
        "inf": "inf",
        "text": "not a number",
        "nothing": "not a number",
    }
    items = [item for name in bad for item in (_item(name, record_id=f"record-{name}"), _item("fine"))]
    with (
        Scorer(RewardConfig(function=f"{user_module}:score"), max_tokens=64, workers=2) as scorer,
        caplog.at_level(logging.WARNING),
    ):
        scores = scorer.score([*items, _item("true")])
        assert scorer.metrics() == {"errors": float(len(bad)), "timeouts": 0.0}
    assert [score.value for score in scores] == [0.0, 0.25] * len(bad) + [1.0]
    for (name, reason), score in zip(bad.items(), scores[::2], strict=False):
        assert reason in score.error
        assert f"record-{name}" in caplog.text


@pytest.mark.parametrize("hang", ["loop", "hold the GIL"])
def test_a_hanging_reward_is_stopped_and_its_worker_replaced(user_module, hang):
    with Scorer(RewardConfig(function=f"{user_module}:score", timeout_s=0.5), max_tokens=64, workers=1) as scorer:
        (before,) = scorer.score([_item("pid")])
        start = time.monotonic()
        hung, after = scorer.score([_item(hang, record_id="hung"), _item("pid")])
        assert time.monotonic() - start < 8
        assert (hung.value, hung.timed_out, after.error) == (0.0, True, None)
        assert "reward.timeout_s=0.5" in hung.error
        assert after.value != before.value
        with pytest.raises(ProcessLookupError):
            os.kill(int(before.value), 0)
        assert scorer.metrics() == {"errors": 1.0, "timeouts": 1.0}


def test_an_endless_power_in_a_math_response_is_stopped():
    with Scorer(RewardConfig(name="math", timeout_s=2.0), max_tokens=64, workers=1) as scorer:
        hung, right = scorer.score([_item(r"\boxed{2^{100000000000}}", answer="3"), _item(r"\boxed{2+2}")])
    assert hung.timed_out
    assert right.value == 1.0


def test_workers_do_not_import_torch_and_use_several_processes(user_module):
    with Scorer(RewardConfig(function=f"{user_module}:score"), max_tokens=64, workers=2) as scorer:
        assert [score.value for score in scorer.score([_item("modules")])] == [0.0]
        pids = {score.value for score in scorer.score([_item("pid")] * 50)}
    assert 1 <= len(pids) <= 2
    assert os.getpid() not in pids


def test_a_long_response_fits_through_the_pipe(user_module):
    with Scorer(RewardConfig(function=f"{user_module}:score"), max_tokens=64, workers=1) as scorer:
        assert scorer.score([_item("x" * 1_000_000)])[0].value == 0.25


def test_workers_end_with_the_scorer(user_module):
    with Scorer(RewardConfig(function=f"{user_module}:score"), max_tokens=64, workers=1) as scorer:
        pid = int(scorer.score([_item("pid")])[0].value)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        ("{module}:missing", "has no function missing"),
        ("{module}:value", "has no function value"),
        ("no_such_module_here:score", "ModuleNotFoundError"),
        ("{module}", "package.module:function"),
    ],
)
def test_a_function_that_cannot_be_used_is_a_config_error(user_module, function, reason):
    with pytest.raises(ConfigError, match="reward.function") as caught:
        Scorer(RewardConfig(function=function.format(module=user_module)), max_tokens=64)
    assert reason in str(caught.value)


def test_the_rewards_package_does_not_import_torch():
    code = "import sys, megatron_rl.rewards.scoring_process; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
