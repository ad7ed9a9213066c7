"""What weight decay reaches."""

import pytest
import torch

from tests.hf_models import make_models
from tests.launching import run_workers


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """After one update, by model (policy, critic), by decay, by name; Qwen2 has biases, too."""
    root = tmp_path_factory.mktemp("decay")
    run_workers("tests.trainer.decay_worker", 1, make_models(root)["qwen2"], root / "weights.pt")
    return torch.load(root / "weights.pt")


@pytest.mark.parametrize("model", ["policy", "critic"])
def test_norms_and_biases_do_not_decay_unless_asked(weights: dict, model: str) -> None:
    none, usual, everything = (weights[model][name] for name in ("none", "usual", "all"))
    vectors = {name for name, value in none.items() if value.ndim == 1}
    assert any("norm" in name for name in vectors) and any("bias" in name for name in vectors)
    assert vectors < none.keys()
    if model == "critic":
        del none["output_layer.weight"]  # the value head begins at 0, where nothing decays
    for name, value in none.items():
        assert torch.equal(usual[name], value) == (name in vectors), name
        if "norm" in name or name not in vectors:  # biases begin at 0 in some models
            assert not torch.equal(everything[name], value), name
