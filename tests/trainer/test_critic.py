"""The critic gives the values that it should, in every parallel layout, learns, and resumes exactly."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from megatron_rl.config import ConfigError
from megatron_rl.trainer import checkpoint
from tests.hf_models import make_models, random_sequences
from tests.launching import run_workers
from tests.trainer.critic_worker import WARMUP, fixed_returns, head_weights

WORKER = "tests.trainer.critic_worker"
STEPS = 4
LAYOUTS = {"pp2": (1, 2), "tp2": (2, 1), "dp2": (1, 1)}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """One whose output layer is its embedding, which the critic must not mistake for its own."""
    return make_models(tmp_path_factory.mktemp("models"))["qwen3"]


@pytest.fixture(scope="module")
def single(model: Path, tmp_path_factory) -> tuple[Path, dict]:
    """The folder of a run of one process that saved before the policy learned, and what it measured."""
    folder = tmp_path_factory.mktemp("single")
    run_workers(WORKER, 1, model, 1, 1, folder / "run", STEPS, WARMUP, folder / "whole")
    return folder, torch.load(folder / "whole.pt")


def test_values_are_the_head_on_the_hidden_states_of_the_policy(model: Path, single):
    _, found = single
    assert not found["at_first"].any(), "a new critic knows nothing"
    trunk, values = AutoModel.from_pretrained(model, dtype=torch.float32), []
    for prompt, response in zip(*random_sequences(12), strict=True):
        hidden = trunk(torch.tensor([prompt + response])).last_hidden_state[0, len(prompt) - 1 : -1]
        values.append(hidden @ head_weights()[0])
    torch.testing.assert_close(found["before"], torch.cat(values).detach(), atol=1e-5, rtol=1e-4)


def test_the_loss_is_the_mean_over_tokens_and_goes_down(single):
    _, found = single
    first, losses = found["metrics"][0], [metrics["critic/loss"] for metrics in found["metrics"]]
    returns = fixed_returns(len(found["before"]))
    assert losses[-1] < 0.6 * losses[0]
    assert first["critic/return_mean"] == pytest.approx(returns.mean().item())
    assert first["critic/value_mean"] == pytest.approx(found["before"].mean().item())
    errors = ((found[when] - returns).square().mean() for when in ("before", "after"))
    assert next(errors) > 2 * next(errors)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_processes_learn_what_one_does(layout: str, model: Path, single, tmp_path: Path):
    _, expected = single
    run_workers(WORKER, 2, model, *LAYOUTS[layout], tmp_path / "run", STEPS, 0, tmp_path / "whole")
    found = torch.load(tmp_path / "whole.pt")
    torch.testing.assert_close(found["before"], expected["before"], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found["after"], expected["after"], atol=1e-3, rtol=1e-3)
    for metrics, others in zip(found["metrics"], expected["metrics"], strict=True):
        # Of some 240 tokens in a mini-batch, the last bits decide about one at the edge of the clip.
        assert metrics.pop("critic/clip_fraction") == pytest.approx(others["critic/clip_fraction"], abs=0.01)
        assert metrics == pytest.approx({name: others[name] for name in metrics}, rel=1e-3, abs=1e-4)


@pytest.mark.slow
def test_a_resumed_critic_ends_with_the_same_bits(model: Path, single):
    folder, whole = single
    run_workers(WORKER, 1, model, 1, 1, folder / "run", STEPS, 0, folder / "resumed")
    resumed = torch.load(folder / "resumed.pt")
    assert torch.equal(resumed["after"], whole["after"])
    assert resumed["metrics"] == whole["metrics"][WARMUP:]
    first, again = (load_file(folder / name / "model.safetensors") for name in ("whole", "resumed"))
    base = load_file(model / "model.safetensors")
    for name, values in first.items():
        assert torch.equal(values, again[name]), f"{name} of the policy beside it"
        assert not torch.equal(values, base[name]), f"{name} was not trained"


def test_a_checkpoint_of_another_algorithm_is_refused(monkeypatch, tmp_path: Path):
    monkeypatch.setattr(checkpoint, "_load", lambda contents, folder: {"state": {"step": 3, "updates": 3}})
    with pytest.raises(ConfigError, match="has no critic, which algorithm.name needs; choose another run_dir"):
        checkpoint._check_critic(tmp_path)
