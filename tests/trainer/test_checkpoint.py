"""A run that resumes continues exactly; the parallel layout may change in between."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_rl.config import ConfigError
from megatron_rl.models.model_folder import DRAFT, REPLACED
from megatron_rl.trainer.checkpoint import (
    checkpoint_folder,
    latest_step,
    load_state,
    remove_old_checkpoints,
    saved_states,
)
from tests.hf_models import make_models
from tests.launching import run_workers

WORKER = "tests.trainer.checkpoint_worker"


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A PP=2 run of 4 steps that saved after 2 of them.

    Its norms of 16 elements make megatron-core pad between parameters, at which its own saving loses data.
    """
    root = tmp_path_factory.mktemp("runs")
    model = make_models(root)["qwen3"]
    run_workers(WORKER, 2, model, 1, 2, root / "run", 4, 2, root / "whole")
    return root, model


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_resumed_run_ends_with_the_same_bits(interrupted):
    root, model = interrupted
    run_workers(WORKER, 2, model, 1, 2, root / "run", 4, 0, root / "resumed")
    whole, resumed, start = weights(root / "whole"), weights(root / "resumed"), weights(model)
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name
        assert not torch.equal(value, start[name]), f"{name} was not trained"


@pytest.mark.parametrize(
    ("tp", "pp", "processes"), [(2, 1, 2), pytest.param(1, 1, 2, marks=pytest.mark.slow)], ids=["tp2", "dp2"]
)
def test_layout_may_change_between_save_and_resume(interrupted, tp: int, pp: int, processes: int):
    root, model = interrupted
    output = root / f"tp{tp}-pp{pp}-{processes}"
    run_workers(WORKER, processes, model, tp, pp, root / "run", 4, 0, output)
    whole, resumed = weights(root / "whole"), weights(output)
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, atol=2e-5, rtol=1e-4, msg=name)


def test_export_loads_in_transformers(interrupted):
    root, _ = interrupted
    model = AutoModelForCausalLM.from_pretrained(root / "whole", dtype=torch.float32)
    assert torch.isfinite(model(torch.arange(10)[None]).logits).all()


def test_a_checkpoint_holds_what_the_driver_keeps(interrupted, tmp_path: Path):
    root, _ = interrupted
    assert load_state(root / "run", 2, "rank") == 0
    assert load_state(root / "run", 2, "unknown") is None
    assert saved_states(root / "run", 2) == ["rank"]
    broken = checkpoint_folder(tmp_path, 3) / "driver" / "rank.json"
    broken.parent.mkdir(parents=True)
    broken.write_text("{")
    with pytest.raises(ConfigError, match=r"rank\.json cannot be read .*; remove it"):
        load_state(tmp_path, 3, "rank")


def test_unfinished_checkpoint_is_not_taken_for_one(tmp_path: Path):
    checkpoint_folder(tmp_path, 3).mkdir(parents=True)
    checkpoint_folder(tmp_path, 7).with_suffix(DRAFT).mkdir(parents=True)
    assert latest_step(tmp_path) == 3
    remove_old_checkpoints(tmp_path, keep=1)
    assert checkpoint_folder(tmp_path, 3).exists()


def test_checkpoint_counts_while_it_is_being_replaced(tmp_path: Path):
    checkpoint_folder(tmp_path, 3).mkdir(parents=True)
    checkpoint_folder(tmp_path, 7).with_suffix(DRAFT).mkdir()
    checkpoint_folder(tmp_path, 7).with_suffix(REPLACED).mkdir()
    assert latest_step(tmp_path) == 7
    remove_old_checkpoints(tmp_path, keep=1)
    assert not checkpoint_folder(tmp_path, 3).exists() and latest_step(tmp_path) == 7


def test_bf16_keeps_its_float32_master_weights_across_a_resume(interrupted, tmp_path: Path):
    _, model = interrupted
    run_workers(WORKER, 1, model, 1, 1, tmp_path / "run", 4, 2, tmp_path / "whole", "bf16")
    run_workers(WORKER, 1, model, 1, 1, tmp_path / "run", 4, 0, tmp_path / "resumed", "bf16")
    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "resumed")
    for name, value in whole.items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, resumed[name]), name
