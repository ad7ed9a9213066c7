"""What the backward pass computes again is the same to the last bit, on every pipeline stage."""

from pathlib import Path

import pytest
import torch

from megatron_rl.config import ConfigError
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.gpt import transformer_config
from tests.hf_models import make_mixture, make_models
from tests.launching import run_workers
from tests.models.parity_worker import make_config


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", "mixture"])
def test_gradients_are_those_of_kept_activations(kind: str, tmp_path: Path) -> None:
    folder = make_models(tmp_path)["qwen3"] if kind == "dense" else make_mixture(tmp_path / "mixture")
    found = {}
    for recompute in ("none", "selective", "full"):
        output = tmp_path / recompute
        output.mkdir()
        run_workers("tests.models.layout_worker", 2, folder, "2", "1", "1", recompute, output)
        ranks = [torch.load(output / f"rank{rank}.pt", weights_only=False) for rank in range(2)]
        found[recompute] = {(name, str(index)): value for rank in ranks for name, index, value in rank["gradients"]}
    for recompute in ("selective", "full"):
        assert found[recompute].keys() == found["none"].keys()
        for name, gradient in found["none"].items():
            assert torch.equal(found[recompute][name], gradient), (recompute, name)
    assert all(gradient.any() for (name, _), gradient in found["none"].items() if "embed" not in name)


def test_recompute_reaches_megatron_and_has_no_second_way(tmp_path: Path) -> None:
    folder = make_mixture(tmp_path / "mixture", num_hidden_layers=1)
    arch = Architecture.from_folder(folder)
    options = transformer_config(make_config(folder, 1, 1, recompute="selective"), arch)
    assert (options.recompute_granularity, options.recompute_modules) == ("selective", ["mlp", "moe"])
    assert transformer_config(make_config(folder, 1, 1), arch).recompute_granularity is None
    config = make_config(folder, 1, 1)
    model = config.model.model_copy(update={"megatron": {"recompute_granularity": "full"}})
    with pytest.raises(ConfigError, match=r"model\.megatron\.recompute_granularity .* set train\.recompute instead"):
        transformer_config(config.model_copy(update={"model": model}), arch)
