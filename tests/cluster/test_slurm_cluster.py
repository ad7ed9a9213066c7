"""Rendered jobs in a real Slurm of two nodes, both played by this machine (tests/cluster/cluster.sh)."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_rl.cluster.slurm import Job, render
from megatron_rl.config import load_config
from tests.launching import ROOT
from tests.rollout.tiny_models import make_model

CLUSTER = ROOT / "tests/cluster/cluster.sh"
FAKE_PYTHON = ROOT / "tests/cluster/fake_python.sh"
DEMO = ROOT / "configs/arithmetic.yaml"
STEPS = 16

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.geteuid() != 0 or shutil.which("apt-get") is None, reason="Slurm is installed by apt and run by root"
    ),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("slurm")
    subprocess.run([CLUSTER, "install"], check=True, timeout=600)
    try:
        subprocess.run([CLUSTER, "start", folder], check=True, timeout=120)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
            patch.setenv("PYTHONPATH", str(ROOT))
            yield
    finally:
        subprocess.run([CLUSTER, "stop", folder], check=True, timeout=60)


def ask(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.strip()


def state(job: str) -> str:
    return ask("scontrol", "--oneliner", "show", "job", job).split("JobState=")[1].split()[0]


def wait_until(what: str, condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.5)


def submit(folder: Path, model: Path, *overrides: str, python: Path = Path(sys.executable)) -> str:
    overrides = (f"model.path={model}", f"run_dir={folder}", *overrides)
    text = render(load_config(DEMO, overrides), Job(2, 0, 1), ["-c", str(DEMO), *overrides], ROOT)
    (folder / "slurm").mkdir(parents=True, exist_ok=True)
    file = folder / "job.sbatch"
    file.write_text(text.replace(f"PYTHON={sys.executable}\n", f"PYTHON={python}\n"))
    return ask("sbatch", "--parsable", file)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), seed=3)


def log(folder: Path, job: str, restart: int, name: str) -> str:
    file = folder / "slurm" / f"{job}.{restart}" / name
    return file.read_text() if file.exists() else ""


def training(folder: Path, job: str) -> bool:
    return all("training" in log(folder, job, 0, f"rank-{rank}.log") for rank in range(2))


def test_a_job_has_ray_on_both_nodes_one_log_per_rank_and_a_port_of_its_own(cluster, model, tmp_path: Path) -> None:
    job = submit(tmp_path, model, python=FAKE_PYTHON)
    wait_until("both ranks", lambda: training(tmp_path, job), 60)
    for rank in range(2):
        first = log(tmp_path, job, 0, f"rank-{rank}.log").splitlines()[0]
        assert first == f"rank {rank} of 2 on n{rank} master=n0:{20000 + int(job)}"
    port = 5000 + int(job)
    assert f"--head --port {port} --include-dashboard=false token=64" in log(tmp_path, job, 0, "ray-head.log")
    assert f"--address n0:{port} token=64" in log(tmp_path, job, 0, "ray-worker-0.log")
    ask("scancel", job)
    wait_until("the cancellation", lambda: state(job) == "CANCELLED", 60)
    time.sleep(3)
    assert state(job) == "CANCELLED", "what a user cancels must not come back"


def test_sigterm_saves_requeues_and_starts_again(cluster, model, tmp_path: Path) -> None:
    job = submit(tmp_path, model, python=FAKE_PYTHON)
    wait_until("both ranks", lambda: training(tmp_path, job), 60)
    ask("scancel", "--batch", "--signal", "TERM", job)
    wait_until("the second start", lambda: state(job) == "COMPLETED", 120)
    for rank in range(2):
        assert log(tmp_path, job, 0, f"rank-{rank}.log").endswith("saved\n")
        assert log(tmp_path, job, 1, f"rank-{rank}.log").endswith("resumed\n")


def test_a_trainer_that_fails_fails_the_job(cluster, model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_STATUS", "3")
    job = submit(tmp_path, model, python=FAKE_PYTHON)
    wait_until("the end", lambda: state(job) == "FAILED", 60)
    assert "the trainers ended with status 3" in (tmp_path / "slurm" / f"{job}.log").read_text()


@pytest.fixture(scope="module")
def base_model(tmp_path_factory) -> Path:
    """The demo's base model, which knows how to work a problem out but seldom does."""
    made = ROOT / "runs/arithmetic-sft/hf"
    if made.exists():
        return made
    folder = tmp_path_factory.mktemp("sft")
    command = [sys.executable, "-m", "megatron_rl.cli", "sft", "-c", ROOT / "configs/arithmetic-sft.yaml"]
    subprocess.run([*command, f"model.path={folder}/scratch", f"run_dir={folder}"], check=True, timeout=900, cwd=ROOT)
    return folder / "hf"


def test_training_on_two_nodes_learns_and_resumes_after_sigterm(cluster, base_model: Path, tmp_path: Path) -> None:
    def records() -> list[dict[str, float]]:
        file = tmp_path / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def steps() -> list[int]:
        return [int(record["step"]) for record in records() if "reward/mean" in record]

    job = submit(tmp_path, base_model, f"train.steps={STEPS}", "eval.every=0", "eval.samples=0", "checkpoint.every=0")
    wait_until("three steps", lambda: len(steps()) >= 3, 400)
    ask("scancel", "--batch", "--signal", "TERM", job)
    wait_until("the second start", lambda: "resuming after step" in log(tmp_path, job, 1, "rank-0.log"), 400)
    wait_until("the end", lambda: state(job) == "COMPLETED", 300)
    assert "stopped after step" in log(tmp_path, job, 0, "rank-0.log")
    assert steps() == list(range(1, STEPS + 1)), "no step lost, none done twice"
    rewards = [record["reward/mean"] for record in records() if "reward/mean" in record]
    assert sum(rewards[-3:]) > sum(rewards[:3]) + 0.3, rewards
    assert (tmp_path / "hf" / "config.json").exists()
