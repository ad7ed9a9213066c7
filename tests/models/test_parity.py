"""The Megatron model is the Hugging Face model: logits, log-probs and gradients, in every parallel layout."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.hf_models import VOCAB, make_models, random_sequences
from tests.launching import run_workers
from tests.models.parity_worker import TEMPERATURE

FAMILIES = ("qwen3", "qwen2", "llama")
LAYOUTS = {"tp1-pp1": (1, 1, 1), "tp2-pp1": (2, 1, 2), "tp1-pp2": (1, 2, 2), "tp2-pp2": (2, 2, 4), "dp2": (1, 1, 2)}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Per model: logits of the first sequence's response, log-probs of all responses, gradients of their mean NLL."""
    root = tmp_path_factory.mktemp("models")
    prompts, responses = random_sequences(12)
    results = {}
    for name, path in make_models(root).items():
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        logits, logprobs = [], []
        for prompt, response in zip(prompts, responses, strict=True):
            row = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
            logits.append(row)
            logprobs.append((row / TEMPERATURE).log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0])
        flat = torch.cat(logprobs)
        (-flat.mean()).backward()
        gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
        results[name] = {"logits": logits[0].detach(), "logprobs": flat.detach(), "gradients": gradients}
    return root, results


SUBSUMED = ("tp2-pp1", "tp1-pp2")
"""What each splits alone, tp2-pp2 splits together."""


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=[pytest.mark.slow] * (name in SUBSUMED)) for name in LAYOUTS]
)
def test_logits_logprobs_and_gradients_equal_transformers(layout: str, reference, tmp_path: Path):
    root, expected = reference
    tp, pp, processes = LAYOUTS[layout]
    names = list(expected) if layout == "tp2-pp2" else FAMILIES  # variants of the families in one layout
    run_workers("tests.models.parity_worker", processes, root, tp, pp, tmp_path, ",".join(names))
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=False) for rank in range(processes)]
    for name in names:
        truth = expected[name]
        results = [rank[name] for rank in ranks]
        assert_logits_equal(name, [result["logits"] for result in results if result["logits"]][:tp], truth["logits"])
        for result in results:
            for kind in ("logprobs", "logprobs_one_by_one"):
                torch.testing.assert_close(result[kind], truth["logprobs"], atol=1e-4, rtol=0, msg=f"{name} {kind}")
        for kind in ("gradients", "gradients_one_by_one"):
            pieces = [result[kind] for result in results]
            assert_gradients_equal(f"{name} {kind}", pieces, truth["gradients"])


def assert_logits_equal(name: str, shards: list[list[torch.Tensor]], truth: torch.Tensor) -> None:
    logits = torch.cat([shard[0][:, 0] for shard in shards], dim=-1)[:, :VOCAB]
    assert torch.isfinite(logits).all()
    torch.testing.assert_close(logits, truth, atol=1e-4, rtol=0, msg=f"{name} logits")


def assert_gradients_equal(name: str, pieces: list, truth: dict[str, torch.Tensor]) -> None:
    seen = {key: torch.zeros_like(value) for key, value in truth.items()}
    for rank in pieces:
        for key, index, values in rank:
            torch.testing.assert_close(values, truth[key][index], atol=2e-5, rtol=1e-3, msg=f"{name} of {key}")
            seen[key][index] += 1
    for key, count in seen.items():
        assert (count == 1).all(), f"{name} of {key}: each element must come from exactly one rank"
