"""The families of `examples/model_family` compute what transformers computes, and the engines follow them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import MistralConfig, MistralForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel

from examples.model_family.mixtral import MISTRAL, MIXTRAL
from megatron_rl.models.scratch import character_tokenizer
from tests.drills import model_experiment
from tests.hf_models import SHAPE
from tests.launching import run_workers
from tests.models.test_mixture import likelihood
from tests.models.test_parity import assert_gradients_equal
from tests.runs.test_train import metrics, run

MODULE = "examples.model_family.mixtral"
FAMILIES = {"MISTRAL": MISTRAL, "MIXTRAL": MIXTRAL}
MODELS: dict[str, Callable[..., PreTrainedModel]] = {
    "MISTRAL": lambda **shape: MistralForCausalLM(MistralConfig(sliding_window=None, **shape)),
    "MIXTRAL": lambda **shape: MixtralForCausalLM(MixtralConfig(num_local_experts=4, num_experts_per_tok=2, **shape)),
}


def make(name: str, folder: Path, **shape: int) -> Path:
    torch.manual_seed(0)
    model = MODELS[name](**SHAPE | shape)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    model.save_pretrained(folder)
    character_tokenizer(SHAPE["max_position_embeddings"]).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", FAMILIES)
def test_logprobs_gradients_and_files_equal_transformers(name: str, tmp_path: Path) -> None:
    folder = make(name, tmp_path / "model", head_dim=24)
    logprobs, gradients = likelihood(folder)
    run_workers("tests.models.layout_worker", 1, folder, *"111", "none", tmp_path, f"{MODULE}:{name}")
    found = torch.load(tmp_path / "rank0.pt", weights_only=False)
    stored, exported = load_file(folder / "model.safetensors"), load_file(tmp_path / "hf" / "model.safetensors")
    assert exported.keys() == stored.keys()
    assert all(torch.equal(exported[key], stored[key]) for key in stored)
    torch.testing.assert_close(found["logprobs"], logprobs, atol=1e-4, rtol=0)
    named = {FAMILIES[name].tensor_name(key): value for key, value in gradients.items()}
    assert_gradients_equal(name, [found["gradients"]], named)


@pytest.mark.slow
def test_a_run_of_mixtral_hands_its_experts_to_an_engine(tmp_path: Path) -> None:
    model = make("MIXTRAL", tmp_path / "model", head_dim=32)
    model_experiment(tmp_path, model, family=f"{MODULE}:MIXTRAL")
    run(tmp_path / "experiment.yaml")
    for step in (1, 2):  # the second one with weights that the first has changed
        assert metrics(tmp_path / "run")[step]["logprob_gap/mean"] < 1e-4
        assert metrics(tmp_path / "run")[step]["optim/grad_norm"] > 0
