"""`megatron-rl drafter warmup`: the head drafts better afterwards, and the folder is one that loads."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from drafter.eagle.head import EagleHead
from drafter.eagle.head_files import load_head, save_head
from drafter.eagle.packed_rows import FrozenPolicy
from megatron_rl.config import ConfigError, load_config
from megatron_rl.drafting.initial_head import initial_head
from megatron_rl.trainer.rollouts_file import read_rollouts
from tests.drafter.policies import sample, small_config
from tests.launching import ROOT
from tests.rollout.helpers import VOCAB_LIMIT
from tests.rollout.tiny_models import make_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model, its rollouts, and an experiment."""
    folder = tmp_path_factory.mktemp("warmup")
    make_model(folder / "model", seed=3)
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    prompts = [[10 + number, 11, 12] for number in range(24) for _ in range(4)]
    rollouts = sample(model, prompts, 40, vocab_limit=VOCAB_LIMIT)
    lines = [json.dumps({"prompt_ids": tokens[:3], "token_ids": tokens[3:]}) for tokens in rollouts]
    (folder / "rollouts.jsonl").write_text("\n".join(lines) + "\n")
    config = {
        "model": {"path": str(folder / "model"), "precision": "fp32"},
        "data": {"max_prompt_tokens": 32},
        "rollout": {"max_tokens": 40},
        "drafter": {"lr": 3e-3, "draft_vocab": 64, "unroll": 3},
        "run_dir": str(folder / "run"),
    }
    (folder / "experiment.yaml").write_text(yaml.safe_dump(config))
    return folder


def warm_up(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "megatron_rl.cli", "drafter", "warmup", "-c", str(folder / "experiment.yaml")]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, cwd=ROOT, timeout=200)


@pytest.mark.slow
def test_it_lifts_the_held_out_length_and_writes_a_head(folder: Path):
    done = warm_up(folder, "--rollouts", str(folder / "rollouts.jsonl"), "--updates", "60")
    assert done.returncode == 0, done.stdout + done.stderr
    lengths = [float(value) for value in re.findall(r"held-out length ([\d.]+)", done.stdout)]
    assert len(lengths) == 4 and lengths[-1] > lengths[0] + 0.1, done.stdout
    head = load_head(folder / "run" / "drafter")
    assert head.config.draft_vocab_size == 64 and all(p.isfinite().all() for p in head.parameters())


def test_heads_that_do_not_fit_are_refused(folder: Path):
    config = load_config(folder / "experiment.yaml", [])
    policy = FrozenPolicy(torch.zeros(128, 64), torch.ones(128, 64))
    with pytest.raises(ConfigError, match=r"make the head with `megatron-rl drafter warmup`"):
        initial_head(config, policy)
    whole = config.model_copy(update={"drafter": config.drafter.model_copy(update={"draft_vocab": None})})
    head = initial_head(whole, policy)
    assert torch.equal(head.lm_head.weight, policy.lm_head), "starts from the policy's"
    assert torch.equal(head.fc.weight, initial_head(whole, policy).fc.weight), "the same on every rank"
    for kind, width, message in (("eagle3", 32, "hidden_size 32"), ("eagle", 64, "kind eagle")):
        save_head(
            EagleHead(small_config(kind, hidden_size=width, vocab_size=128, draft_vocab_size=128)), folder / "bad"
        )
        bad = whole.model_copy(update={"drafter": whole.drafter.model_copy(update={"path": str(folder / "bad")})})
        with pytest.raises(ConfigError, match=message):
            initial_head(bad, policy)


def test_rollouts_that_cannot_be_used_are_named(tmp_path: Path):
    file = tmp_path / "rollouts.jsonl"
    for line, message in {
        "": "holds no rollouts",
        "{": "rollouts.jsonl:1 is not a rollout",
        '{"prompt_ids": [1]}': "rollouts.jsonl:1 is not a rollout .KeyError: 'token_ids'",
        '{"prompt_ids": [1], "token_ids": [99]}': "token ids below 50",
        '{"prompt_ids": [1], "token_ids": []}': "token ids below 50",
    }.items():
        file.write_text(line)
        with pytest.raises(ConfigError, match=message):
            read_rollouts(file, 50)
    with pytest.raises(ConfigError, match="does not exist"):
        read_rollouts(tmp_path / "nothing", 50)
