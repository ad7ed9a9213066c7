"""The whole loop, as a user starts it: real Megatron trainers, a real vLLM engine, real Ray."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from tests.drills import metrics
from tests.launching import ROOT
from tests.rollout.tiny_models import make_model

STEPS = 3


@pytest.fixture(scope="module")
def experiment(tmp_path_factory) -> Path:
    """A config file for a short run on two pipeline stages, with every optional pass switched on."""
    folder = tmp_path_factory.mktemp("train")
    make_model(folder / "model", seed=3)
    config = {
        "model": {"path": str(folder / "model"), "precision": "fp32"},
        "parallel": {"pp_size": 2},
        "data": {"max_prompt_tokens": 32, "arithmetic": {"train_size": 64, "eval_size": 8}},
        "reward": {"name": "numeric", "length_penalty": {"start": 4, "coef": 0.5}},
        "algorithm": {"group_size": 4, "kl": {"coef": 0.01}, "entropy_coef": 0.001, "dual_clip": 3.0},
        "train": {
            "steps": STEPS,
            "prompts_per_step": 4,
            "num_minibatches": 2,
            "tokens_per_microbatch": 128,
            "lr": 1e-3,
        },
        "rollout": {"max_tokens": 24, "verify_weights": True, "vllm": {"enforce_eager": True, "max_num_seqs": 32}},
        "eval": {"samples": 2, "best": "greedy_accuracy"},
        "checkpoint": {"every": 1, "keep": 2},
        "track": {"wandb": {"mode": "offline"}},
        "run_dir": str(folder / "whole"),
    }
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def start(config: Path, *overrides: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "megatron_rl.cli", "train", "-c", str(config), *overrides]
    log = (config.parent / "log.txt").open("a")
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True)


def run(config: Path, *overrides: str) -> None:
    process = start(config, *overrides)
    assert process.wait(timeout=300) == 0, (config.parent / "log.txt").read_text()[-6000:]


@pytest.fixture(scope="module")
def whole(experiment: Path) -> Path:
    """The folder of a run that nothing disturbed."""
    run(experiment)
    return experiment.parent / "whole"


def test_run_logs_exact_behaviour_and_learns_something(whole: Path):
    steps = metrics(whole)
    assert sorted(steps) == list(range(STEPS + 1))
    assert {"eval/arithmetic-heldout/greedy_accuracy", "eval/arithmetic-heldout/avg_at_k"} <= steps[0].keys()
    for step in range(1, STEPS + 1):
        assert steps[step]["logprob_gap/mean"] < 1e-4
        assert steps[step]["optim/grad_norm"] > 0
        assert steps[step]["reward/errors"] == steps[step]["reward/timeouts"] == 0
    assert steps[STEPS]["loss/kl"] > 1e-5, "the policy must have moved away from the reference"
    assert not [name for name in steps[STEPS] if name.startswith("drafter/")], "no run pays for a drafter unasked"


def test_run_keeps_the_best_policy_by_its_evaluations(whole: Path):
    measured = {step: values.get("eval/arithmetic-heldout/greedy_accuracy") for step, values in metrics(whole).items()}
    evaluated = {step: value for step, value in measured.items() if value is not None}
    best = json.loads((whole / "best" / "driver" / "best.json").read_text())
    first = min(step for step, value in evaluated.items() if value == max(evaluated.values()))
    assert best == {"metric": "greedy_accuracy", "value": evaluated[first], "step": first}
    assert (whole / "best" / "megatron" / "metadata.json").is_file() and (whole / "best" / "config.json").is_file()


def test_run_leaves_config_report_plots_and_wandb_file(whole: Path):
    assert yaml.safe_load((whole / "config.yaml").read_text())["train"]["steps"] == STEPS
    assert "reward" in (whole / "report.md").read_text()
    assert list(whole.glob("**/*.png"))
    assert list(whole.glob("wandb/offline-run-*/*.wandb"))


def test_only_the_newest_checkpoints_are_kept(whole: Path):
    assert sorted(path.name for path in (whole / "checkpoints").iterdir()) == ["step_000002", "step_000003"]


def test_export_is_the_trained_model(experiment: Path, whole: Path):
    base = AutoModelForCausalLM.from_pretrained(experiment.parent / "model", dtype=torch.float32)
    trained = AutoModelForCausalLM.from_pretrained(whole / "hf", dtype=torch.float32)
    tokens = torch.arange(5, 25)[None]
    difference = (base(tokens).logits - trained(tokens).logits).abs().max()
    assert 1e-4 < difference < 100


@pytest.mark.slow
def test_export_loads_in_stock_vllm(whole: Path):
    code = (
        "from vllm import LLM, SamplingParams\n"
        f"llm = LLM({str(whole / 'hf')!r}, dtype='float32', max_model_len=64, enforce_eager=True)\n"
        "output = llm.generate('12+34', SamplingParams(max_tokens=4, temperature=0), use_tqdm=False)\n"
        "print('tokens', len(output[0].outputs[0].token_ids))\n"
    )
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=200)
    assert "tokens " in done.stdout, done.stderr[-3000:]


@pytest.mark.parametrize("kill_after", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_killed_run_continues_as_if_nothing_had_happened(experiment: Path, whole: Path, kill_after: int):
    run_dir = experiment.parent / f"killed-{kill_after}"
    override = f"run_dir={run_dir}"
    process = start(experiment, override)
    deadline = time.monotonic() + 200
    while f'"step": {kill_after},' not in _read(run_dir / "metrics.jsonl"):
        assert process.poll() is None and time.monotonic() < deadline, _read(experiment.parent / "log.txt")[-4000:]
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    run(experiment, override)
    assert_same_metrics(metrics(run_dir), metrics(whole))


@pytest.mark.slow
def test_run_survives_the_death_of_its_engine_and_nothing_changes(experiment: Path, whole: Path):
    run_dir = experiment.parent / "engine-killed"
    process = start(experiment, f"run_dir={run_dir}")
    deadline = time.monotonic() + 200
    while '"step": 1,' not in _read(run_dir / "metrics.jsonl"):
        assert process.poll() is None and time.monotonic() < deadline, _read(experiment.parent / "log.txt")[-4000:]
        time.sleep(0.02)
    descendants = psutil.Process(process.pid).children(recursive=True)
    engines = [child for child in descendants if child.name().startswith("ray::RolloutEng")]
    assert len(engines) == 1, [child.name() for child in descendants]
    engines[0].kill()
    assert process.wait(timeout=300) == 0, _read(experiment.parent / "log.txt")[-6000:]
    assert "restarting it" in _read(experiment.parent / "log.txt")
    assert_same_metrics(metrics(run_dir), metrics(whole))


@pytest.mark.slow
def test_sigterm_to_one_rank_saves_and_the_run_goes_on(experiment: Path, whole: Path):
    run_dir = experiment.parent / "terminated"
    overrides = (f"run_dir={run_dir}", "checkpoint.every=0")
    process = start(experiment, *overrides)
    deadline = time.monotonic() + 200
    while '"step": 1,' not in _read(run_dir / "metrics.jsonl"):
        assert process.poll() is None and time.monotonic() < deadline, _read(experiment.parent / "log.txt")[-4000:]
        time.sleep(0.02)
    ranks = {child.environ().get("RANK"): child for child in psutil.Process(process.pid).children()}
    ranks["1"].send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 0, _read(experiment.parent / "log.txt")[-6000:]
    assert "as SIGTERM asked" in _read(experiment.parent / "log.txt")
    assert not (run_dir / "hf").exists(), "the run has not come to its end"
    run(experiment, *overrides)
    assert (run_dir / "hf").exists()
    assert_same_metrics(metrics(run_dir), metrics(whole))


def assert_same_metrics(found: dict[int, dict[str, float]], expected: dict[int, dict[str, float]]) -> None:
    assert sorted(found) == sorted(expected)
    for step, values in expected.items():
        assert found[step].keys() == values.keys()
        for name, value in values.items():
            assert found[step][name] == pytest.approx(value, rel=1e-4, abs=1e-6), f"{name} of step {step}"


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""
