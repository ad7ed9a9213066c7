"""A mixture of experts in Megatron is the one of transformers, in every layout, with and without recomputing."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.hf_models import make_mixture, random_sequences
from tests.launching import run_workers
from tests.models.parity_worker import TEMPERATURE
from tests.models.test_parity import assert_gradients_equal

# processes, pipeline stages, context and expert parallel size, recompute; the last has two copies of each expert
LAYOUTS = {
    "one-process": (1, 1, 1, 1, "none"),
    "ep2": (2, 1, 1, 2, "selective"),
    "cp2-ep2": (2, 1, 2, 2, "full"),
    "pp2": (2, 2, 1, 1, "selective"),
    "ep2-pp2": (4, 2, 1, 2, "none"),
    "ep2-dp4": (4, 1, 1, 2, "full"),
}
FAST = ("one-process", "ep2")


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The model folder; log-probs of all responses, and gradients of their mean negative log-likelihood."""
    folder = make_mixture(tmp_path_factory.mktemp("mixture") / "model")
    return folder, *likelihood(folder)


def likelihood(folder: Path) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """By transformers: log-probs of 13 responses, and gradients of their mean negative log-likelihood by names."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    logprobs = []
    for prompt, response in zip(*random_sequences(13), strict=True):
        row = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        logprobs.append((row / TEMPERATURE).log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0])
    flat = torch.cat(logprobs)
    (-flat.mean()).backward()
    return flat.detach(), hf_names({name: value.grad for name, value in model.named_parameters()})


def hf_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As in files: transformers keeps the experts of a layer in one tensor, but saves them one by one."""
    split = {}
    for name, tensor in tensors.items():
        prefix, _, kind = name.rpartition(".")
        if not prefix.endswith(".experts"):
            split[name] = tensor
            continue
        for number, expert in enumerate(tensor):
            if kind == "down_proj":
                split[f"{prefix}.{number}.down_proj.weight"] = expert
            else:
                split[f"{prefix}.{number}.gate_proj.weight"], split[f"{prefix}.{number}.up_proj.weight"] = expert.chunk(
                    2
                )
    return split


@pytest.mark.parametrize(
    "layout", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS]
)
def test_logprobs_gradients_and_files_equal_transformers(layout: str, reference, tmp_path: Path):
    folder, logprobs, gradients = reference
    processes, pp, cp, ep, recompute = LAYOUTS[layout]
    sizes = map(str, (pp, cp, ep))
    run_workers("tests.models.layout_worker", processes, folder, *sizes, recompute, tmp_path)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=False) for rank in range(processes)]
    stored, exported = load_file(folder / "model.safetensors"), load_file(tmp_path / "hf" / "model.safetensors")
    assert exported.keys() == stored.keys()
    assert all(torch.equal(exported[name], stored[name]) for name in stored)
    for rank in ranks:
        torch.testing.assert_close(rank["logprobs"], logprobs, atol=1e-4, rtol=0)
        assert rank["names"] == rank["order"]
        assert set(rank["names"]) == set(stored)
        for name, index, value in rank["pieces"]:
            assert torch.equal(value, stored[name][index])
    assert_gradients_equal(layout, [rank["gradients"] for rank in ranks], gradients)
    sent = sum(value.numel() for rank in ranks for _, _, value in rank["pieces"])
    assert sent == sum(value.numel() for value in stored.values())
    metrics = ranks[0]["metrics"]
    assert 1 < metrics["moe/load_max"] <= 3  # two of six experts at most have all tokens
    assert math.log(2) / math.log(6) <= metrics["moe/load_entropy"] < 1
