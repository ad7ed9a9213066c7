"""How trainer processes find each other."""

import os
import subprocess
import sys

import pytest

from megatron_rl.config import Config, ConfigError
from megatron_rl.distributed.runtime import initialize
from tests.launching import ROOT

LAUNCHERS = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK")


def test_two_runs_without_a_launcher_share_a_machine() -> None:
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHERS}
    command = [sys.executable, "-m", "tests.distributed.runtime_worker"]
    runs = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT)
        for _ in range(2)
    ]
    try:
        # Neither ends before both are there.
        assert [run.stdout.readline() for run in runs if run.stdout is not None] == ["together 1\n"] * 2
    finally:
        for run in runs:
            run.communicate(timeout=120)
    assert [run.returncode for run in runs] == [0, 0]


def test_several_processes_are_told_what_says_where_they_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = Config.model_validate({"model": {"path": "unused"}, "run_dir": "unused"})
    with pytest.raises(ConfigError, match="MASTER_ADDR and MASTER_PORT do not say where .*; start them with"):
        initialize(config)
