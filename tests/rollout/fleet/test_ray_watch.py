"""Ray's own death is noticed in seconds."""

import subprocess
import sys

import pytest
import ray

from megatron_rl.config import ConfigError
from rollout.fleet.local_ray import start_ray
from tests.launching import ROOT


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gcs_server", "raylet"])
def test_the_part_that_died_is_named(name: str) -> None:
    command = [sys.executable, "-m", "tests.rollout.fleet.ray_watch_worker", name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"Ray has died: its {name}, on this machine. The engines are lost with it" in done.stderr


STOPPED = """
import sys, time, ray
from rollout.fleet.local_ray import start_ray
from rollout.fleet.ray_watch import RayWatch
start_ray()
watch = RayWatch(lambda sentence: None)
if sys.argv[1] == "exit":
    sys.exit("the one sentence")
ray.shutdown()
time.sleep(5)  # the watch looks twice
sys.exit("the one sentence")
"""


@pytest.mark.parametrize("how", ["exit", "shutdown"])
def test_a_run_that_ends_while_ray_is_watched_says_its_own_sentence_alone(how: str) -> None:
    command = [sys.executable, "-c", STOPPED, how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "the one sentence"
    assert "Traceback" not in done.stderr and "Ray has died" not in done.stderr


def test_a_cluster_that_cannot_be_reached_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(ConfigError, match="^Ray at RAY_ADDRESS=127.0.0.1:1 cannot be reached; start it there, or uns"):
        start_ray()


def test_a_ray_that_does_not_start_in_time_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def time_out(**options: object) -> None:
        raise Exception("The current node timed out during startup.\nThis could happen because ...")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", time_out)
    with pytest.raises(ConfigError, match="^Ray does not start on this machine; .*timed out during startup. This"):
        start_ray()
