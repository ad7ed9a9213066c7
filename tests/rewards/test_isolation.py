"""What a user's reward sees of the run, and what stays of what it starts."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_rl.config.sections import RewardConfig
from megatron_rl.rewards import ScoreItem, Scorer
from tests.launching import ROOT

TIMEOUT_S = 4.0  # enough on a machine with much else to do
USER_MODULE = """
import json, multiprocessing, os, signal, subprocess, sys, tempfile, threading, time

def daemon(file):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            with open(file, "w") as out:
                out.write(str(os.getpid()))
            time.sleep(600)
        os._exit(0)
    while not (os.path.exists(file) and os.path.getsize(file)):
        time.sleep(0.01)

helper = subprocess.Popen(["sleep", "600"])  # started by the import: it stays as long as the process

def score(prompt, response, answer):
    if response == "look":
        descriptors = {int(fd): os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")}
        with open(answer, "w") as out:
            out.write(json.dumps({
                "descriptors": {fd: path for fd, path in descriptors.items() if os.path.exists(path)},
                "numbers": [fd for fd in descriptors if not descriptors[fd].startswith(f"/proc/{os.getpid()}/fd")],
                "environment": dict(os.environ),
                "parents": open(f"/proc/{os.getppid()}/environ").read(),
                "input": sys.stdin.read(),
            }))
    elif response == "daemon":
        daemon(answer)
    elif response == "daemon, then hang":
        daemon(answer)
        time.sleep(600)
    elif response == "daemon, then crash":
        daemon(answer)
        os._exit(1)
    elif response == "daemon from a thread, then return":
        thread = threading.Thread(target=daemon, args=(answer,))
        thread.start()
        thread.join()
    elif response == "shell":
        process = subprocess.Popen(["sh", "-c", "sleep 600 & setsid sleep 600"], start_new_session=True)
        with open(answer, "w") as out:
            out.write(str(process.pid))
    elif response == "thread":
        threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
        return os.getpid()
    elif response == "fork and return twice":
        return 1.0 if os.fork() else 0.5
    elif response == "change folder":
        os.chdir("/")
    elif response == "folder":
        return float(os.getcwd() == "/")
    elif response == "alarm":
        signal.setitimer(signal.ITIMER_REAL, 0.2)
    elif response == "close everything":
        os.closerange(0, 256)
    elif response == "write":
        print("x" * 3_000_000)
    elif response == "temporary file":
        with open(answer, "w") as out:
            out.write(tempfile.mkdtemp())
    elif response == "SIGTERM":
        os.kill(os.getppid(), signal.SIGTERM)
    elif response == "multiprocessing":
        with multiprocessing.get_context("fork").Pool(1) as pool:
            return pool.apply(abs, (-3,))
    elif response == "helper":
        return float(helper.poll() is None) * helper.pid
    elif response == "pid":
        return os.getpid()
    elif response == "dict":
        return {"score": 0.75, "acc": True}
    return 1.0
"""


@pytest.fixture
def function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"isolated_reward_{os.getpid()}"
    (tmp_path / f"{name}.py").write_text(USER_MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return f"{name}:score"


@pytest.fixture
def call(function: str, tmp_path: Path) -> Iterator[Callable[[str], float]]:
    """Scores a response in one process; what the function writes is in `tmp_path / "out"`."""
    reward = RewardConfig(function=function, timeout_s=TIMEOUT_S, environment=["JUDGE_KEY"])
    with Scorer(reward, max_tokens=64, workers=1) as scorer:

        def score(response: str) -> float:
            (tmp_path / "out").unlink(missing_ok=True)
            return scorer.score([ScoreItem("p", response, str(tmp_path / "out"), 1, response)])[0].value

        yield score


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def ends_within(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while lives(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not lives(pid)


@pytest.fixture
def secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "WANDB_API_KEY", "RANK", "MASTER_ADDR", "RAY_ADDRESS", "DATABASE_URL"):
        monkeypatch.setenv(name, f"secret of {name}")
    monkeypatch.setenv("JUDGE_KEY", "asked for")


def test_a_reward_sees_no_descriptor_and_no_environment_of_the_run(
    secrets: None, call: Callable[[str], float], tmp_path: Path
) -> None:
    assert call("look") == 1.0
    seen = json.loads((tmp_path / "out").read_text())
    assert set(seen["numbers"]) <= {0, 1, 2}
    assert seen["descriptors"]["0"] == "/dev/null"
    assert seen["input"] == ""
    assert "secret of" not in str(seen["environment"])
    assert "secret of" not in seen["parents"]
    assert seen["environment"]["JUDGE_KEY"] == "asked for"
    assert seen["environment"]["PATH"] == os.environ["PATH"]


@pytest.mark.parametrize(
    "response",
    ["daemon", "daemon, then hang", "daemon, then crash", "daemon from a thread, then return", "shell"],
)
def test_processes_that_a_call_starts_end_with_it(response: str, call: Callable[[str], float], tmp_path: Path) -> None:
    call(response)
    assert ends_within(int((tmp_path / "out").read_text()), 0.5)


def test_threads_that_a_call_leaves_end_by_its_time_limit(call: Callable[[str], float]) -> None:
    pid = int(call("thread"))
    assert ends_within(pid, TIMEOUT_S + 1.0)
    assert int(call("pid")) not in (0, pid)


def test_what_the_import_starts_stays(call: Callable[[str], float]) -> None:
    helper = call("helper")
    call("shell")
    assert call("helper") == helper > 0


def test_a_call_does_not_disturb_the_next(call: Callable[[str], float]) -> None:
    pid = call("pid")
    assert call("change folder") == 1.0
    assert call("folder") == 0.0
    assert call("alarm") == 1.0
    time.sleep(0.4)
    assert call("fork and return twice") == 1.0
    assert call("multiprocessing") == 3.0
    assert call("write") == 1.0
    assert call("SIGTERM") == 1.0
    assert call("dict") == 0.75
    assert call("close everything") == 1.0
    assert call("pid") == pid


def test_temporary_files_go_with_the_scorer(function: str, tmp_path: Path) -> None:
    with Scorer(RewardConfig(function=function), max_tokens=64, workers=1) as scorer:
        scorer.score([ScoreItem("p", "temporary file", str(tmp_path / "out"), 1, "r")])
        folder = Path((tmp_path / "out").read_text())
        assert folder.is_dir()
    assert not folder.exists()
    assert not folder.parent.exists()


RUN = """
import sys, time
from megatron_rl.config.sections import RewardConfig
from megatron_rl.rewards import ScoreItem, Scorer
scorer = Scorer(RewardConfig(function=sys.argv[1], timeout_s=60), max_tokens=64, workers=1)
pid = scorer.score([ScoreItem("p", "pid", "", 1, "r")])[0].value
helper = scorer.score([ScoreItem("p", "helper", "", 1, "r")])[0].value
print(int(pid), int(helper), flush=True)
scorer.score([ScoreItem("p", "daemon, then hang", sys.argv[2], 1, "r")])
"""


@pytest.mark.parametrize("whole_group", [False, True])
def test_nothing_outlives_a_run_that_is_killed(whole_group: bool, function: str, tmp_path: Path) -> None:
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    run = subprocess.Popen(
        [sys.executable, "-c", RUN, function, str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": path},
        start_new_session=True,
    )
    assert run.stdout is not None
    pids = list(map(int, run.stdout.readline().split()))
    while not (tmp_path / "out").exists() or not (tmp_path / "out").read_text():
        assert run.poll() is None
        time.sleep(0.02)
    pids.append(int((tmp_path / "out").read_text()))
    assert all(map(lives, pids))
    (os.killpg if whole_group else os.kill)(run.pid, signal.SIGKILL)
    run.wait()
    run.stdout.close()
    assert [pid for pid in pids if not ends_within(pid, 5.0)] == []
