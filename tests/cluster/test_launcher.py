"""Starting, stopping and failing of trainer processes, and a user's own launcher."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from megatron_rl.cluster.launcher import (
    _report,
    check_experiment,
    expand_counts,
    first_host,
    process_environment,
    slurm_task,
)
from megatron_rl.config import Config, ConfigError
from megatron_rl.distributed import device

SLURM = {
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_NODELIST": "gpu[007-008]",
    "SLURM_STEP_TASKS_PER_NODE": "3,2",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_JOB_ID": "4711",
}


def start(script: Path, processes: int) -> subprocess.Popen[str]:
    program = (
        "from megatron_rl.cluster.launcher import start_processes;"
        f"exit(start_processes({processes}, [{str(script)!r}]))"
    )
    clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment = clean | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", program], env=environment, stderr=subprocess.PIPE, text=True)


def sleepers(tmp_path: Path) -> tuple[subprocess.Popen[str], list[int]]:
    """A launcher with two ranks that have written their process ids and sleep."""
    script = tmp_path / "sleep.py"
    script.write_text(
        "import os, pathlib, time\n"
        "from megatron_rl.cluster.launcher import die_with_launcher\n"
        "die_with_launcher()\n"
        f"file = pathlib.Path({str(tmp_path)!r}) / ('rank' + os.environ['RANK'])\n"
        "file.with_suffix('.tmp').write_text(str(os.getpid()))\n"
        "file.with_suffix('.tmp').rename(file)\n"
        "time.sleep(120)\n"
    )
    launcher = start(script, 2)
    files = [tmp_path / "rank0", tmp_path / "rank1"]
    wait_until(lambda: all(file.exists() for file in files))
    return launcher, [int(file.read_text()) for file in files]


def wait_until(condition, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.1)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_first_error_is_the_last_line_and_its_status_is_kept(tmp_path: Path) -> None:
    script = tmp_path / "fail.py"
    script.write_text(
        "import os, sys, time\n"
        "from torch.distributed.elastic.multiprocessing.errors import record\n"
        "if os.environ['RANK'] == '0':\n"
        "    time.sleep(60)\n"
        "@record\n"
        "def main():\n"
        "    raise RuntimeError('the disk is full')\n"
        "main()\n"
    )
    launcher = start(script, 2)
    _, errors = launcher.communicate(timeout=120)
    assert launcher.returncode == 1
    assert errors.splitlines()[-1] == "trainer process 1 failed first: RuntimeError: the disk is full"
    assert "Setting OMP_NUM_THREADS" not in errors


@pytest.mark.parametrize(
    ("ago", "status", "sentence"),
    [
        (2, 137, "trainer process 1 was ended by SIGKILL"),
        # It waited for the other one, until torchrun killed it.
        (31, 1, "trainer process 0 failed first: RuntimeError: connection closed by peer"),
    ],
)
def test_a_killed_process_is_named_before_those_that_notice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], ago: int, status: int, sentence: str
) -> None:
    extra = {"py_callstack": "", "timestamp": str(int(time.time()) - ago)}
    recorded = {"message": {"message": "RuntimeError: connection closed by peer", "extraInfo": extra}}
    (tmp_path / "error.json").write_text(json.dumps(recorded))
    failures = {
        0: ProcessFailure(local_rank=0, pid=11, exitcode=1, error_file=str(tmp_path / "error.json")),
        1: ProcessFailure(local_rank=1, pid=12, exitcode=-signal.SIGKILL, error_file=str(tmp_path / "none")),
    }
    assert _report(ChildFailedError("train", failures)) == status
    assert capsys.readouterr().err.startswith(sentence)


def test_the_status_of_a_config_error_gets_through(tmp_path: Path) -> None:
    script = tmp_path / "fail.py"
    script.write_text("import sys\nsys.exit(2)\n")
    launcher = start(script, 1)
    launcher.communicate(timeout=120)
    assert launcher.returncode == 2


@pytest.mark.parametrize(("stop", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_ending_the_launcher_ends_all_processes(tmp_path: Path, stop: signal.Signals, status: int) -> None:
    launcher, ranks = sleepers(tmp_path)
    launcher.send_signal(stop)
    launcher.communicate(timeout=60)
    assert launcher.returncode == status
    wait_until(lambda: not any(alive(pid) for pid in ranks), 20)


def test_what_the_user_has_set_wins() -> None:
    config = Config.model_validate({"model": {"path": "m"}, "run_dir": "r"})
    defaults = device.process_environment(config, 2)
    result = process_environment(config, 2, {"OMP_NUM_THREADS": "7", "HOME": "/home/me"})
    assert result == defaults | {"OMP_NUM_THREADS": "7", "HOME": "/home/me"}
    assert defaults["OMP_NUM_THREADS"] != "7"


def test_a_task_of_a_slurm_step_becomes_a_rank() -> None:
    assert slurm_task(SLURM) == {
        "RANK": "3",
        "WORLD_SIZE": "5",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "gpu007",
        "MASTER_PORT": "24711",
    }


def test_a_batch_script_or_a_single_task_is_no_rank() -> None:
    assert slurm_task({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}) is None
    assert slurm_task(SLURM | {"SLURM_STEP_NUM_TASKS": "1"}) is None


def test_incomplete_slurm_variables_are_one_sentence() -> None:
    with pytest.raises(ConfigError, match="SLURM_LOCALID"):
        slurm_task({name: value for name, value in SLURM.items() if name != "SLURM_LOCALID"})


@pytest.mark.parametrize(("text", "counts"), [("4", [4]), ("4(x2),3", [4, 4, 3]), ("1(x3)", [1, 1, 1])])
def test_tasks_per_node(text: str, counts: list[int]) -> None:
    assert expand_counts(text) == counts


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("n0", "n0"), ("n0,n1", "n0"), ("gpu[007-009,12],login", "gpu007"), ("a-b[3,5]", "a-b3"), ("n[1-2]-ib", "n1-ib")],
)
def test_first_host_of_a_node_list(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


def test_a_model_from_scratch_is_checked_against_the_layout_it_will_have(tmp_path: Path) -> None:
    values = {"model": {"path": str(tmp_path), "precision": "fp32", "scratch": {"layers": 6}}, "run_dir": "r"}
    values["data"] = {"max_prompt_tokens": 64}
    values["rollout"] = {"max_tokens": 64}
    check_experiment(Config.model_validate(values), "sft")
    with pytest.raises(ConfigError, match="pp_size=4"):
        check_experiment(Config.model_validate(values | {"parallel": {"pp_size": 4}}), "sft")
    with pytest.raises(ConfigError, match="config.json"):  # `train` makes no model
        check_experiment(Config.model_validate(values), "train")
