"""`megatron-rl eval` as a user starts it: real trainer processes hand the weights to a real engine."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.launching import ROOT
from tests.rollout.tiny_models import make_model

ENGINE_STARTS = "starting 1 rollout engine"


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model, and an experiment on two pipeline stages that drafts."""
    folder = tmp_path_factory.mktemp("eval")
    make_model(folder / "model", seed=3)
    config = {
        "model": {"path": str(folder / "model"), "precision": "fp32"},
        "parallel": {"pp_size": 2},
        "data": {"max_prompt_tokens": 32, "arithmetic": {"train_size": 64, "eval_size": 8}},
        "reward": {"name": "numeric"},
        "eval": {"samples": 3},
        "rollout": {
            "max_tokens": 12,
            "speculation": {"adaptive": "static", "max_draft_tokens": 3},
            "vllm": {"enforce_eager": True, "max_num_seqs": 32},
        },
        "run_dir": str(folder / "run"),
    }
    (folder / "experiment.yaml").write_text(yaml.safe_dump(config))
    return folder


def megatron_rl(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_rl.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300, check=False)


def evaluate(experiment: Path, *arguments: str | Path) -> str:
    done = megatron_rl("eval", "-c", experiment / "experiment.yaml", *arguments)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout


@pytest.fixture(scope="module")
def results(experiment: Path) -> Path:
    """The folder of an evaluation of the model of the experiment."""
    shown = evaluate(experiment)
    assert ENGINE_STARTS in shown and "avg@3" in shown
    return experiment / "run" / "eval" / "model"


@pytest.mark.slow
def test_every_problem_has_a_line_and_every_measure_a_value(results: Path) -> None:
    lines = [json.loads(line) for line in (results / "arithmetic-heldout.jsonl").read_text().splitlines()]
    assert len(lines) == 8
    assert all(len(line["samples"]) == 3 and line["greedy"]["tokens"] > 0 for line in lines)
    summary = json.loads((results / "summary.json").read_text())["sets"]["arithmetic-heldout"]
    assert list(summary) == ["greedy_accuracy", "avg@3", "pass@2", "pass@3", "majority@2", "majority@3"]
    right = sum(sample["correct"] for line in lines for sample in line["samples"])
    assert summary["avg@3"]["value"] == pytest.approx(right / 24)


@pytest.mark.slow
def test_a_megatron_checkpoint_without_drafts_gives_the_same_responses(experiment: Path, results: Path) -> None:
    done = megatron_rl("convert", "--to", "megatron", experiment / "model", experiment / "checkpoint")
    assert done.returncode == 0, done.stderr
    evaluate(experiment, "--checkpoint", experiment / "checkpoint", "rollout.speculation.adaptive=off")
    expected = (results / "arithmetic-heldout.jsonl").read_bytes()
    assert (experiment / "run" / "eval" / "checkpoint" / "arithmetic-heldout.jsonl").read_bytes() == expected


@pytest.mark.slow
def test_a_stopped_evaluation_goes_on_and_another_seed_needs_another_folder(experiment: Path, results: Path) -> None:
    file = results / "arithmetic-heldout.jsonl"
    whole = file.read_bytes()
    file.write_bytes(b"".join(whole.splitlines(keepends=True)[:5]))
    assert "5 of 8 problems are done already" in evaluate(experiment)
    assert file.read_bytes() == whole
    refused = megatron_rl("eval", "-c", experiment / "experiment.yaml", "--seed", "1")
    assert refused.returncode != 0
    assert "results with train.seed = 0, not 1; choose another --output" in refused.stderr
    assert file.read_bytes() == whole
