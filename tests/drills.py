"""Small runs that tests disturb: started as a user starts them, watched through their files and processes."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import yaml

from tests.launching import ROOT
from tests.rollout.tiny_models import make_model

# What may differ between two runs: times, and what follows from them.
MACHINE_DEPENDENT = ("time/", "throughput/", "weight_sync/")


def experiment_file(folder: Path, steps: int, **sections: dict[str, Any]) -> Path:
    """A config file for a small run in `folder/run`, with checkpoints of every step; `sections` come on top."""
    if not (folder / "model").exists():
        make_model(folder / "model", seed=3)
    config: dict[str, Any] = {
        "model": {"path": str(folder / "model"), "precision": "fp32"},
        "data": {"max_prompt_tokens": 32, "eval": [], "arithmetic": {"train_size": 64, "eval_size": 8}},
        "reward": {"function": "tests.runs.odd_reward:score"},  # which random responses differ in
        "algorithm": {"group_size": 4},
        "train": {"steps": steps, "prompts_per_step": 4, "tokens_per_microbatch": 128, "lr": 1e-3},
        "rollout": {"max_tokens": 24, "vllm": {"enforce_eager": True, "max_num_seqs": 32}},
        "checkpoint": {"every": 1, "keep": 3, "export_hf": False},
        "track": {"report": False},
        "run_dir": str(folder / "run"),
    }
    for name, values in sections.items():
        config[name] = config.get(name, {}) | values
    file = folder / "experiment.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def model_experiment(folder: Path, model: Path, **model_keys: str) -> Path:
    """A config file for two steps with a model of one's own, whose rewards differ whatever it says."""
    return experiment_file(
        folder,
        2,
        model={"path": str(model), **model_keys},
        reward={"function": "tests.runs.odd_reward:one_in_four"},
        train={"lr": 1e-2},
        checkpoint={"export_hf": True},
    )


def start(file: Path) -> subprocess.Popen:
    """`megatron-rl train` in a session of its own; what it prints goes to `log.txt` beside the file, from where its
    modules are imported too."""
    command = [sys.executable, "-m", "megatron_rl.cli", "train", "-c", str(file)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(file.parent)])
    with (file.parent / "log.txt").open("a") as log:
        return subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True
        )


def run(file: Path) -> None:
    """A run that ends well."""
    process = start(file)
    try:
        assert process.wait(timeout=300) == 0, read(file.parent / "log.txt")[-6000:]
    finally:
        ended(process)


def ended(process: subprocess.Popen) -> None:
    """Take a run down, with everything that it started."""
    family = []
    if process.poll() is None:
        family = psutil.Process(process.pid).children(recursive=True)
        process.kill()
    process.wait()
    for child in family:
        if child.is_running():
            child.kill()


def wait_for_step(process: subprocess.Popen, folder: Path, step: int) -> None:
    """Wait until the run has logged that step."""
    wait_until(
        lambda: f'"step": {step},' in read(folder / "run" / "metrics.jsonl"),
        lambda: f"{process.poll()} {read(folder / 'log.txt')[-4000:]}",
        process,
    )


def wait_until(
    condition: Callable[[], bool],
    explain: Callable[[], str] = lambda: "",
    process: subprocess.Popen | None = None,
    seconds: float = 240,
) -> None:
    """Poll until `condition` holds; an error when it does not in time, or when `process` has ended before."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, explain()
        assert process is None or process.poll() is None, explain()
        time.sleep(0.05)


def family(process: subprocess.Popen) -> list[psutil.Process]:
    """All processes that the run has started."""
    return psutil.Process(process.pid).children(recursive=True)


def rank(process: subprocess.Popen, number: int) -> psutil.Process:
    """The trainer process of that rank."""
    (found,) = [child for child in psutil.Process(process.pid).children() if child.environ().get("RANK") == str(number)]
    return found


def metrics(run_dir: Path) -> dict[int, dict[str, float]]:
    """Metrics by step, without those that depend on the machine."""
    steps: dict[int, dict[str, float]] = {}
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        kept = {name: value for name, value in record.items() if not name.startswith(MACHINE_DEPENDENT)}
        steps.setdefault(record["step"], {}).update(kept)
    return steps


def alive(process: psutil.Process) -> bool:
    """Whether it still runs: one that has ended may wait for its parent to look."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def read(path: Path) -> str:
    """The text of a file, or nothing while there is none."""
    return path.read_text(errors="replace") if path.exists() else ""
