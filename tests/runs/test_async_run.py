"""Whole runs whose generation overlaps training, or whose responses outlast a step: real trainers, vLLM and Ray."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml

from tests.rollout.tiny_models import make_model
from tests.runs.test_train import _read, metrics, run, start

pytestmark = pytest.mark.slow

STEPS = 4


@pytest.fixture(scope="module")
def experiment(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("async")
    make_model(folder / "model", seed=3)
    config = {
        "model": {"path": str(folder / "model"), "precision": "fp32"},
        "parallel": {"pp_size": 2},
        "data": {"max_prompt_tokens": 32, "arithmetic": {"train_size": 64, "eval_size": 4}},
        "reward": {"name": "numeric", "length_penalty": {"start": 4, "coef": 0.5}},
        "algorithm": {"group_size": 4},
        "train": {"steps": STEPS, "prompts_per_step": 4, "tokens_per_microbatch": 128, "lr": 1e-3},
        "rollout": {
            "max_tokens": 48,
            "verify_weights": True,
            "speculation": {"adaptive": "static"},
            "vllm": {"enforce_eager": True, "max_num_seqs": 4},
        },
        "eval": {"every": 2},
        "checkpoint": {"every": 1, "keep": STEPS, "export_hf": False},
        "run_dir": str(folder / "sync"),
    }
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def check(steps: dict[int, dict[str, float]], bound: float) -> None:
    for step in range(1, STEPS + 1):
        found = steps[step]
        assert 0 <= found["staleness/mean"] <= found["staleness/max"] <= bound
        # What the engine says of a token is what the trainer of that version would; older ones differ, and not wildly.
        assert found["logprob_gap/mean"] < (1e-3 if found["staleness/max"] == 0 else 1.0)
    assert "eval/arithmetic-heldout/greedy_accuracy" in steps[2]


def test_a_run_one_step_ahead_stays_within_its_bound_and_resumes_with_what_was_under_way(experiment: Path) -> None:
    run_dir = experiment.parent / "ahead"
    options = ("rollout.async_steps=1", f"run_dir={run_dir}")
    process = start(experiment, *options)
    deadline = time.monotonic() + 200
    while not (run_dir / "checkpoints" / "step_000002" / "driver" / "pool.pt").exists():
        assert process.poll() is None and time.monotonic() < deadline, _read(experiment.parent / "log.txt")[-4000:]
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    run(experiment, *options)
    assert "resuming after step" in _read(experiment.parent / "log.txt")
    assert "are dropped" not in _read(experiment.parent / "log.txt")
    steps = metrics(run_dir)
    check(steps, bound=1)
    assert steps[1]["staleness/max"] == 0
    assert steps[3]["staleness/max"] == 1, "the third step's prompts were begun before the second update"
    for name in ("overlap/training_waited_s", "overlap/engines_waited_s"):
        assert steps[2][name] >= 0
    pool = torch.load(run_dir / "checkpoints" / "step_000002" / "driver" / "pool.pt", weights_only=True)
    assert pool["numbers"] == list(range(8, 12)) and pool["rollouts"]


def test_a_run_with_partial_responses_learns_from_whole_ones(experiment: Path) -> None:
    run_dir = experiment.parent / "partial"
    run(experiment, "rollout.partial=true", "rollout.partial_fraction=0.5", f"run_dir={run_dir}")
    steps = metrics(run_dir)
    check(steps, bound=STEPS)
    assert steps[1]["staleness/max"] == 0
    assert any(steps[step]["partial/unfinished"] > 0 for step in range(1, STEPS + 1))
    assert any(steps[step]["staleness/max"] > 0 for step in range(2, STEPS + 1)), "a response went on in a later step"
