"""A run drafts with a head that is trained beside it, and learns bit for bit what it learns without speculation."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.launching import ROOT
from tests.rollout.tiny_models import make_model

STEPS = 3
EQUAL = ("reward/", "response/", "loss/", "optim/", "eval/")
SPECULATION = {"adaptive": "static", "drafters": ["eagle"], "max_draft_tokens": 3}
DRAFTER = {"lr": 3e-3, "unroll": 3, "tokens_per_slice": 128, "min_slices": 8, "fill": ["bubbles"]}


def run(folder: Path, name: str, **rollout: object) -> dict[int, dict[str, float]]:
    """Metrics by step of a run on two pipeline stages."""
    config = {
        "model": {"path": str(folder / "model"), "precision": "fp32"},
        "parallel": {"pp_size": 2},
        "data": {"max_prompt_tokens": 32, "arithmetic": {"train_size": 64, "eval_size": 16}},
        "reward": {"function": "tests.runs.odd_reward:score"},
        # Without correction nothing is learned of the engine's log-probabilities: their last bits may depend on how
        # many rows a matrix product has.
        "algorithm": {"group_size": 4, "kl": {"coef": 0.01}, "correction": {"kind": "none"}},
        "train": {
            "steps": STEPS,
            "prompts_per_step": 8,
            "num_minibatches": 2,
            "tokens_per_microbatch": 128,
            "lr": 1e-3,
        },
        "rollout": {"max_tokens": 24, "vllm": {"enforce_eager": True, "max_num_seqs": 32}, **rollout},
        "drafter": DRAFTER,
        "eval": {"every": 1, "samples": 2},
        "checkpoint": {"export_hf": False},
        "track": {"report": False},
        "run_dir": str(folder / name),
    }
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "megatron_rl.cli", "train", "-c", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=400)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    steps: dict[int, dict[str, float]] = {}
    for line in (folder / name / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        steps.setdefault(record["step"], {}).update(record)
    return steps


@pytest.mark.slow
def test_rewards_losses_and_accuracy_are_those_of_a_run_without_speculation(tmp_path: Path):
    make_model(tmp_path / "model", seed=3)
    plain = run(tmp_path, "plain", speculation={"adaptive": "off"})
    drafting = run(tmp_path, "drafting", speculation=SPECULATION)
    assert sorted(plain) == sorted(drafting) == list(range(STEPS + 1))
    for step, expected in plain.items():
        found = drafting[step]
        names = [name for name in expected if name.startswith(EQUAL)]
        assert {name: found[name] for name in names} == {name: expected[name] for name in names}, f"step {step}"
        assert 0 < expected["eval/arithmetic-heldout/greedy_accuracy"] < 1, "or equal accuracies would mean nothing"
        assert 0 < expected["eval/arithmetic-heldout/avg_at_k"] < 1
    for step in range(1, STEPS + 1):
        assert {"reward/mean", "response/length_mean", "loss/policy", "loss/kl"} <= plain[step].keys()
        assert plain[step]["reward/std"] > 0 and plain[step]["optim/grad_norm"] > 0
        for name in ("logprob_gap/mean", "logprob_gap/max"):
            assert drafting[step][name] == pytest.approx(plain[step][name], abs=2e-6)
        assert not [name for name in plain[step] if name.startswith(("drafter/", "speculation/"))]
        drafted = sum(value for name, value in drafting[step].items() if name.endswith("/eagle:3"))
        assert drafted > 5 and drafting[step]["speculation/draft_token_fraction"] > 0
        assert drafting[step]["drafter/slices"] >= 2 * DRAFTER["min_slices"]
    assert drafting[STEPS - 1]["drafter/version"] > 0, "engines draft with a pushed head in the last step"
