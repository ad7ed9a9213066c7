"""A mixture of experts in whole runs: with an engine that gets its weights, and over checkpoints."""

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.hf_models import make_mixture
from tests.launching import run_workers
from tests.rollout.tiny_models import make_model
from tests.runs.test_train import metrics, run

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}


@pytest.mark.slow
def test_a_run_trains_experts_on_two_ranks_and_its_engine_follows(tmp_path: Path) -> None:
    make_model(tmp_path / "model", seed=3, model_type="qwen3_moe", **EXPERTS)
    config = {
        "model": {"path": str(tmp_path / "model"), "precision": "fp32"},
        "parallel": {"ep_size": 2, "dp_size": 2},
        "data": {"max_prompt_tokens": 32, "arithmetic": {"train_size": 64, "eval_size": 4}, "eval": []},
        "reward": {"function": "tests.runs.odd_reward:one_in_four"},
        "algorithm": {"group_size": 4},
        "train": {
            "steps": 3,
            "prompts_per_step": 4,
            "tokens_per_microbatch": 128,
            "lr": 1e-2,
            "router_aux_loss": 1e-3,
            "recompute": "selective",
        },
        "rollout": {
            "max_tokens": 24,
            "speculation": {"drafters": ["ngram"], "adaptive": "thompson"},
            "vllm": {"enforce_eager": True, "max_num_seqs": 32},
        },
        "track": {"report": False},
        "run_dir": str(tmp_path / "run"),
    }
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(config))
    run(tmp_path / "experiment.yaml")
    steps = metrics(tmp_path / "run")
    for step in range(1, 4):
        # From the second step on only with weights that have reached every expert of the engine.
        assert steps[step]["logprob_gap/mean"] < 1e-4
        assert steps[step]["optim/grad_norm"] > 0
        assert 1 < steps[step]["moe/load_max"] <= 2
    before, after = (
        load_file(tmp_path / "model" / "model.safetensors"),
        load_file(tmp_path / "run/hf/model.safetensors"),
    )
    moved = [name for name in before if not torch.allclose(before[name], after[name], atol=1e-3)]
    assert len([name for name in moved if ".experts." in name]) == 2 * 4 * 3


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same_bits_and_says_when_experts_are_dealt_otherwise(tmp_path: Path) -> None:
    model = make_mixture(tmp_path / "model")
    worker, run_dir = "tests.trainer.checkpoint_worker", tmp_path / "run"
    run_workers(worker, 2, model, "1", "1", run_dir, "4", "2", tmp_path / "whole", "fp32", "2")
    run_workers(worker, 2, model, "1", "1", run_dir, "4", "0", tmp_path / "same", "fp32", "2")
    whole, same = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "same"))
    for name, value in whole.items():
        assert torch.equal(same[name], value), name
    with pytest.raises(AssertionError, match=r"saved with parallel\.ep_size more than 1, .* set parallel\.ep_size"):
        run_workers(worker, 1, model, "1", "1", run_dir, "4", "0", tmp_path / "alone", "fp32", "1")
