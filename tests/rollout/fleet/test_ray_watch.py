"""Ray's own death is noticed in seconds."""

import subprocess
import sys

import pytest

from tests.launching import ROOT


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gcs_server", "raylet"])
def test_the_part_that_died_is_named(name: str) -> None:
    command = [sys.executable, "-m", "tests.rollout.fleet.ray_watch_worker", name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"Ray has died: its {name}, on this machine. The engines are lost with it" in done.stderr
