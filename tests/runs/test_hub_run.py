"""An experiment whose model is a name on the hub, from a cache and without a network, in all commands."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.hub import COMMIT, fill_cache, hub_environment
from tests.launching import ROOT
from tests.rollout.tiny_models import make_model

NAME, PINNED = "Org/Name", f"Org/Name@{COMMIT}"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an experiment, and with the hub's cache in which its model is."""
    home = tmp_path_factory.mktemp("home")
    fill_cache(home, NAME, make_model(home / "files", seed=3))
    config = {
        "model": {"path": NAME, "precision": "fp32"},
        "parallel": {"pp_size": 2},
        "data": {"max_prompt_tokens": 32, "arithmetic": {"train_size": 64, "eval_size": 4}},
        "reward": {"name": "numeric"},
        "algorithm": {"group_size": 2},
        "train": {"steps": 1, "prompts_per_step": 2, "tokens_per_microbatch": 128},
        "rollout": {"max_tokens": 12, "vllm": {"enforce_eager": True, "max_num_seqs": 16}},
        "track": {"report": False},
        "run_dir": str(home / "run"),
    }
    (home / "experiment.yaml").write_text(yaml.safe_dump(config))
    return home


def megatron_rl(home: Path, *arguments: str | Path, status: int = 0) -> str:
    """Its output, without a network."""
    command = [sys.executable, "-m", "megatron_rl.cli", *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, timeout=600, env=hub_environment(home), check=False
    )
    assert done.returncode == status, (done.stdout + done.stderr)[-6000:]
    return done.stdout + done.stderr


def test_a_plan_and_the_config_need_no_weights(home: Path) -> None:
    shown = megatron_rl(home, "plan", "-c", home / "experiment.yaml")
    assert "2 trainer processes (tp 1, pp 2, dp 1) on 1 node" in shown
    assert "path: Org/Name\n" in megatron_rl(home, "config", "-c", home / "experiment.yaml")


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        (("train", "-c", "FILE", "model.path=Org/Other"), "model.path='Org/Other' is not a folder here"),
        (("eval", "-c", "FILE", "--checkpoint", "Org/Name@v9"), "--checkpoint 'Org/Name@v9' is not a folder here"),
        (("convert", "--to", "megatron", "Org/Other", "FILE.out"), "SOURCE 'Org/Other' is not a folder here"),
        (("train", "-c", "FILE", "parallel.pp_size=3"), "parallel.pp_size=3 does not divide the model's"),
    ],
)
def test_mistakes_are_one_sentence_before_anything_starts(home: Path, command: tuple[str, ...], sentence: str) -> None:
    shown = megatron_rl(home, *(part.replace("FILE", str(home / "experiment.yaml")) for part in command), status=2)
    assert shown.startswith(sentence) and len(shown.splitlines()) == 1


@pytest.mark.slow
def test_a_run_keeps_the_commit_and_exports_the_models_files(home: Path) -> None:
    megatron_rl(home, "train", "-c", home / "experiment.yaml")
    kept = yaml.safe_load((home / "run" / "config.yaml").read_text())
    assert kept["model"]["path"] == PINNED
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= {file.name for file in (home / "run/hf").iterdir()}
    megatron_rl(home, "eval", "-c", home / "experiment.yaml", "--checkpoint", f"{NAME}@main")
    assert (home / "run" / "eval" / f"Name@{COMMIT[:8]}" / "summary.json").is_file()


@pytest.mark.slow
def test_a_name_is_converted(home: Path) -> None:
    megatron_rl(home, "convert", "--to", "megatron", NAME, home / "megatron")
    megatron_rl(home, "convert", "--to", "hf", home / "megatron", home / "back")
    expected, found = (load_file(folder / "model.safetensors") for folder in (home / "files", home / "back"))
    assert all(torch.equal(found[name], value) for name, value in expected.items())
