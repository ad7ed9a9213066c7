"""Whole runs by `algorithm.name`: dynamic sampling in a real fleet, and that every algorithm trains."""

from pathlib import Path

import pytest
import yaml

from megatron_rl.config.algorithm import PRESETS
from tests.rollout.tiny_models import make_model
from tests.runs.test_train import assert_same_metrics, metrics, run

STEPS = 3


@pytest.fixture(scope="module")
def experiment(tmp_path_factory) -> Path:
    """DAPO with two engines and two updates per step."""
    folder = tmp_path_factory.mktemp("algorithms")
    make_model(folder / "model", seed=3)
    config = {
        "model": {"path": str(folder / "model"), "precision": "fp32"},
        "data": {"max_prompt_tokens": 32, "arithmetic": {"train_size": 64, "eval_size": 4}, "eval": []},
        "reward": {"function": "tests.runs.odd_reward:one_in_four", "length_penalty": {"start": 4, "coef": 0.5}},
        "algorithm": {"name": "dapo", "group_size": 4},
        "train": {
            "steps": STEPS,
            "prompts_per_step": 4,
            "num_minibatches": 2,
            "tokens_per_microbatch": 128,
            "lr": 1e-3,
        },
        "rollout": {"engines": 2, "max_tokens": 24, "vllm": {"enforce_eager": True, "max_num_seqs": 32}},
        "checkpoint": {"every": 1, "keep": 1, "export_hf": False},
        "track": {"report": False},
        "run_dir": str(folder / "whole"),
    }
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.mark.slow
def test_a_run_with_dynamic_sampling_resumes_exactly(experiment: Path) -> None:
    run(experiment)
    whole = metrics(experiment.parent / "whole")
    asked = [whole[step]["sampling/prompts"] for step in range(1, STEPS + 1)]
    assert sum(asked[:2]) > 2 * 4, "no prompt was replaced before the interruption: choose another reward or seed"
    for step in range(1, STEPS + 1):
        assert whole[step]["sampling/dropped_fraction"] == pytest.approx(1 - 4 / whole[step]["sampling/prompts"])
        assert whole[step]["sampling/filled_prompts"] == 0
        assert whole[step]["logprob_gap/mean"] < 1e-4
    halves = experiment.parent / "halves"
    run(experiment, f"run_dir={halves}", "train.steps=2")
    run(experiment, f"run_dir={halves}")
    assert_same_metrics(metrics(halves), whole)


@pytest.mark.slow
def test_a_run_with_a_critic_on_two_stages_resumes_exactly(experiment: Path) -> None:
    options = ["algorithm.name=ppo", "algorithm.kl.coef=0.01", "algorithm.kl.place=reward", "parallel.pp_size=2"]
    options += ["algorithm.critic.warmup_steps=1", "algorithm.critic.lr=1e-3", "algorithm.critic.lam=0.9"]
    run(experiment, f"run_dir={experiment.parent / 'critic'}", *options)
    whole = metrics(experiment.parent / "critic")
    assert whole[1]["critic/value_mean"] == 0 and whole[1]["critic/grad_norm"] > 0
    assert "loss/policy" not in whole[1], "the first step is the critic's alone"
    assert whole[2]["critic/value_mean"] != 0 and whole[2]["optim/grad_norm"] > 0
    assert whole[1]["reward/kl"] == pytest.approx(0, abs=1e-6), "the policy was still the reference"
    assert whole[3]["reward/kl"] != pytest.approx(0, abs=1e-6)
    halves = experiment.parent / "critic-halves"
    run(experiment, f"run_dir={halves}", *options, "train.steps=2")
    run(experiment, f"run_dir={halves}", *options)
    assert_same_metrics(metrics(halves), whole)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_algorithm_trains_and_reuses_earlier_responses(experiment: Path, name: str) -> None:
    run_dir = experiment.parent / name
    options = ["train.steps=2", "data.arithmetic.train_size=4", "rollout.history={mode: lenient, lenience: 0.5}"]
    run(experiment, f"run_dir={run_dir}", *options, f"algorithm.name={name}")
    first, second = (metrics(run_dir)[step] for step in (1, 2))
    assert first["optim/grad_norm"] > 0 and second["optim/grad_norm"] > 0
    assert first["history/found_fraction"] < second["history/found_fraction"]
    assert second["history/reused_tokens"] > 0
    assert ("sampling/prompts" in second) == (name == "dapo")
