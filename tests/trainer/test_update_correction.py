"""Corrections in the trainer: what they do does not depend on how a mini-batch is split."""

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_rl.algorithms import correct_mismatch
from megatron_rl.config.algorithm import CorrectionConfig
from tests.hf_models import make_models, random_sequences
from tests.launching import run_workers
from tests.trainer.correction_worker import AGGREGATIONS, ALGORITHMS, FORMS, SCORED_IN_UPDATE

CASES = [("token-mask", name) for name in ALGORITHMS]
CASES += [(form, aggregation) for form in FORMS for aggregation in AGGREGATIONS[: 3 if form == "token-mask" else 1]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Results of the only rank of one process, and of both ranks of two."""
    root = tmp_path_factory.mktemp("correction")
    model = make_models(root)["qwen3"]
    prompts, responses = random_sequences(12)
    old = reference_logprobs(model, prompts, responses)
    lengths = torch.tensor([len(response) for response in responses])
    generator = torch.Generator().manual_seed(2)
    # Engine and trainer agree better on some responses than on others.
    scale = torch.tensor([0.1, 0.4] * 6).repeat_interleave(lengths)
    rollout = old + scale * torch.randn(len(old), generator=generator)
    advantages = torch.randn(len(old), generator=generator)
    for form, options in FORMS.items():
        rejected = ~correct_mismatch(old, rollout, lengths, CorrectionConfig(**options)).kept
        assert (0 < rejected.sum() < len(old)) == ("mask" in form), form
    values = {"old_logprobs": old, "rollout_logprobs": rollout, "advantages": advantages}
    torch.save((prompts, responses, values), root / "values.pt")
    found = {}
    for processes in (1, 2):
        output = root / f"dp{processes}"
        output.mkdir()
        run_workers("tests.trainer.correction_worker", processes, model, root / "values.pt", output)
        found[processes] = [torch.load(output / f"rank{rank}.pt") for rank in range(processes)]
    return found


def reference_logprobs(model: Path, prompts: list[list[int]], responses: list[list[int]]) -> torch.Tensor:
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    found = []
    with torch.no_grad():
        for prompt, response in zip(prompts, responses, strict=True):
            rows = network(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            found.append(rows.gather(1, torch.tensor(response)[:, None])[:, 0])
    return torch.cat(found)


@pytest.mark.parametrize(("form", "aggregation"), CASES)
def test_loss_and_gradients_do_not_depend_on_micro_batches_and_data_parallel_ranks(runs, form, aggregation):
    expected = runs[1][0]["corrected"][form, aggregation, 128]
    assert expected["metrics"]["grad_norm"] > 1e-3
    for processes, tokens in ((1, 1), (2, 128), (2, 1)):
        ranks = [rank["corrected"][form, aggregation, tokens] for rank in runs[processes]]
        assert ranks[0]["metrics"] == pytest.approx(expected["metrics"], rel=1e-4, abs=1e-6)
        for name, gradient in expected["gradients"].items():
            found = ranks[0]["gradients"][name]
            torch.testing.assert_close(found, gradient, atol=2e-5, rtol=1e-3, msg=f"{name} on {processes}")


@pytest.mark.parametrize("form", SCORED_IN_UPDATE)
@pytest.mark.parametrize("processes", [1, 2])
def test_log_probs_of_the_update_stand_for_those_of_a_pass_before_it(runs, form, processes):
    for rank in runs[processes]:
        before, update = rank["scored"][form, "before"], rank["scored"][form, "in update"]
        assert torch.equal(update["old_logprobs"], before["old_logprobs"])
        assert torch.equal(update["weights"], before["weights"])
        assert update["metrics"] == before["metrics"]
        assert update["correction"] == before["correction"]
        for name, gradient in before["gradients"].items():
            assert torch.equal(update["gradients"][name], gradient), name
    driver = runs[processes][0]["scored"][form, "in update"]
    assert driver["metrics"]["grad_norm"] > 1e-3
    assert (driver["correction"]["clipped_fraction"] > 0) == (form != "none")


def test_every_form_trains_differently(runs):
    norms = [runs[1][0]["corrected"][form, aggregation, 128]["metrics"]["grad_norm"] for form, aggregation in CASES]
    assert all(abs(a - b) > 1e-4 * a for i, a in enumerate(norms) for b in norms[:i]), norms


@pytest.mark.parametrize("processes", [1, 2])
def test_a_mini_batch_that_is_rejected_whole_leaves_the_policy_as_it_is(runs, processes):
    for rank in runs[processes]:
        for name, before in rank["rejected"]["before"].items():
            assert torch.equal(rank["rejected"]["after"][name], before), name
    driver = runs[processes][0]["rejected"]
    assert all(math.isfinite(value) for value in driver["metrics"].values()), driver["metrics"]
    assert [driver[step]["skipped"] for step in ("usual", "metrics", "again")] == [0, 1, 0]
    assert driver["metrics"]["loss"] == driver["metrics"]["grad_norm"] == 0
    assert math.isfinite(driver["again"]["loss"])
    assert driver["again"]["loss"] != driver["usual"]["loss"]
