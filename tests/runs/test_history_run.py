"""Reuse over the epochs of whole runs, with two engines: real trainers, real vLLM, real Ray."""

import os
import signal
import time
from pathlib import Path

import pytest
import yaml

from tests.rollout.tiny_models import make_model
from tests.runs.test_train import _read, assert_same_metrics, metrics, run, start

STEPS, STEPS_PER_EPOCH, TARGET = 4, 2, 1e-3
# How drafts fare depends on the machine, as their number follows from measured times.
OF_DRAFTS = ("speculation/", "saved/", "history/verify_seconds", "history/drafted_", "history/generated_")


@pytest.fixture(scope="module")
def experiment(tmp_path_factory) -> Path:
    """Two epochs of two steps, with a checkpoint after each step."""
    folder = tmp_path_factory.mktemp("history")
    make_model(folder / "model", seed=3)
    history = {"mode": "lenient", "lenience": -0.2, "budget": {"target": TARGET}, "refresh": 0.2, "max_draft_tokens": 8}
    config = {
        "model": {"path": str(folder / "model"), "precision": "fp32"},
        "data": {"max_prompt_tokens": 32, "arithmetic": {"train_size": 8, "eval_size": 4}, "eval": []},
        "reward": {"name": "numeric", "length_penalty": {"start": 4, "coef": 0.5}},
        "algorithm": {"group_size": 4},
        "train": {"steps": STEPS, "prompts_per_step": 4, "tokens_per_microbatch": 128, "lr": 1e-3},
        "rollout": {
            "engines": 2,
            "max_tokens": 24,
            "history": history,
            "vllm": {"enforce_eager": True, "max_num_seqs": 32},
        },
        "checkpoint": {"every": 1, "keep": 1},
        "run_dir": str(folder / "whole"),
    }
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def steady(run_dir: Path) -> dict[int, dict[str, float]]:
    """Metrics that do not depend on the machine, by step."""
    return {
        step: {name: value for name, value in values.items() if not name.startswith(OF_DRAFTS)}
        for step, values in metrics(run_dir).items()
    }


@pytest.fixture(scope="module")
def whole(experiment: Path) -> Path:
    run(experiment)
    return experiment.parent / "whole"


@pytest.mark.slow
def test_the_second_epoch_reuses_the_first(whole: Path) -> None:
    steps = metrics(whole)
    for step in range(1, STEPS + 1):
        found = steps[step]
        by_source = ("reused", "drafted", "generated")
        tokens = sum(found[f"history/{source}_tokens"] for source in by_source)
        assert tokens == pytest.approx(found["response/length_mean"] * 16)
        assert (found["history/reused_tokens"] > 0) == (step > STEPS_PER_EPOCH)
        assert found["logprob_gap/mean"] < 1e-4, "engine log-probs are the current policy's, also of kept tokens"
    assert steps[STEPS_PER_EPOCH + 1]["history/lenience"] == -0.2, "until then there was nothing to measure"
    below = steps[STEPS_PER_EPOCH + 1]["history/kl"] < TARGET
    assert (steps[STEPS_PER_EPOCH + 2]["history/lenience"] > -0.2) == below


@pytest.mark.slow
def test_a_run_that_is_killed_in_the_middle_of_an_epoch_continues_exactly(experiment: Path, whole: Path) -> None:
    run_dir = experiment.parent / "killed"
    process = start(experiment, f"run_dir={run_dir}")
    deadline = time.monotonic() + 200
    while f'"step": {STEPS_PER_EPOCH + 1},' not in _read(run_dir / "metrics.jsonl"):
        assert process.poll() is None and time.monotonic() < deadline, _read(experiment.parent / "log.txt")[-4000:]
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    run(experiment, f"run_dir={run_dir}")
    assert "resuming after step" in _read(experiment.parent / "log.txt")
    assert_same_metrics(steady(run_dir), steady(whole))
