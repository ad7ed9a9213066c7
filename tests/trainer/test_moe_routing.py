"""The routers' own losses against their formulas on the model of transformers, and the figures about load."""

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_rl.trainer.batch import plan_microbatches
from megatron_rl.trainer.moe_routing import load_metrics
from tests.hf_models import make_mixture, random_sequences
from tests.launching import run_workers
from tests.trainer.moe_routing_worker import SEQUENCES


def test_load_is_told_from_counts_by_hand() -> None:
    even, one_sided = [5.0, 5.0, 5.0, 5.0], [10.0, 10.0, 0.0, 0.0]
    balanced = {"moe/load_max": 1.0, "moe/load_entropy": 1.0, "moe/idle_fraction": 0.0}
    assert load_metrics(torch.tensor([even])) == pytest.approx(balanced)
    metrics = load_metrics(torch.tensor([even, one_sided]))
    assert metrics["moe/load_max"] == 2.0  # half of the tokens, instead of a quarter
    assert metrics["moe/load_entropy"] == pytest.approx((1 + math.log(2) / math.log(4)) / 2)
    assert metrics["moe/idle_fraction"] == 0.25


@pytest.mark.parametrize(
    ("aux", "z", "budget", "recompute"),
    [
        pytest.param(0.3, 0.0, 1000, "none", marks=pytest.mark.slow),
        (0.3, 0.2, 60, "full"),
        pytest.param(0.0, 0.2, 60, "selective", marks=pytest.mark.slow),
    ],
)
def test_router_losses_have_the_gradients_of_their_formulas(
    aux: float, z: float, budget: int, recompute: str, tmp_path: Path
) -> None:
    folder = make_mixture(tmp_path / "model")
    run_workers("tests.trainer.moe_routing_worker", 1, folder, str(aux), str(z), str(budget), recompute, tmp_path)
    found = torch.load(tmp_path / "rank0.pt")

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    logits: dict[int, list[torch.Tensor]] = {}
    for number, layer in enumerate(model.model.layers):
        layer.mlp.gate.register_forward_hook(
            lambda gate, inputs, _, number=number: logits.setdefault(number, []).append(
                inputs[0].reshape(-1, 64) @ gate.weight.T
            )
        )
    sequences = [prompt + response for prompt, response in zip(*random_sequences(SEQUENCES), strict=True)]
    for sequence in sequences:
        model(torch.tensor([sequence]))
    total = sum(map(len, sequences))
    (rows,) = plan_microbatches([len(sequence) for sequence in sequences], budget, 1)
    assert (len(rows) > 1) == (budget == 60)
    loss = torch.zeros(())
    for layer, of_sequences in logits.items():
        counts = torch.zeros(6)
        for row in rows:
            scores = torch.cat([of_sequences[index] for index in row])
            chosen = torch.nn.functional.one_hot(scores.topk(2).indices, 6).sum(1).float()
            counts += chosen.sum(0)
            # Switch Transformer, equation 4, with two experts to a token; ST-MoE, equation 5.
            balance = 6 * (chosen.mean(0) / 2 * scores.softmax(-1).mean(0)).sum()
            size = scores.logsumexp(-1).square().mean()
            loss = loss + len(scores) / total * (aux * balance + z * size)
        torch.testing.assert_close(found["counts"][layer], counts)
    loss.backward()
    for name, gradient in found["gradients"].items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, atol=1e-6, rtol=1e-3, msg=name)
    assert len(found["gradients"]) == 4
