"""The trainer's passes are the same with and without a filler."""

from pathlib import Path

import torch

from tests.hf_models import make_models
from tests.launching import run_workers


def test_training_with_filled_bubbles_is_training(tmp_path: Path):
    model = make_models(tmp_path)["qwen3"]  # tied embeddings: the flush comes before their reduction
    run_workers("tests.drafter.idle_time.trainer_worker", 2, model, tmp_path)
    for rank in range(2):
        plain, filled, bubbles = torch.load(tmp_path / f"rank{rank}.pt", weights_only=False)
        assert filled["metrics"] == plain["metrics"]
        assert torch.equal(filled["logprobs"], plain["logprobs"])
        for expected, weight in zip(plain["weights"], filled["weights"], strict=True):
            assert torch.equal(expected, weight)
        assert bubbles["slices"] == bubbles["stats"]["slices"] > 0
    assert plain["logprobs"].abs().sum() > 0
