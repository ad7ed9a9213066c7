"""Rows that are dealt to context-parallel ranks: every token once, and log-probs and gradients as of whole rows."""

from pathlib import Path

import pytest
import torch

from megatron_rl.models.context_parallel import held_places
from megatron_rl.trainer.batch import Batch, build_microbatch
from tests.hf_models import make_models, random_sequences
from tests.launching import run_workers
from tests.models.test_mixture import likelihood
from tests.models.test_parity import assert_gradients_equal

CPU = torch.device("cpu")


def test_chunks_are_dealt_from_both_ends() -> None:
    # Two sequences of 8 and 4 tokens; chunks of 2 and of 1.
    assert held_places([8, 4], 0, 2).tolist() == [0, 1, 6, 7, 8, 11]
    assert held_places([8, 4], 1, 2).tolist() == [2, 3, 4, 5, 9, 10]
    assert held_places([8, 4], 0, 1).tolist() == list(range(12))


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("indices", [[3, 0, 2], []])
def test_parts_of_a_row_have_every_response_token_once_behind_the_one_before_it(
    size: int, multiple: int, indices: list[int]
) -> None:
    batch = Batch(*random_sequences(5))
    batch.values["advantages"] = torch.arange(batch.tokens).float()
    whole = build_microbatch(batch, indices, 1, CPU)
    targets = torch.full_like(whole.targets, -1)
    for rank in range(size):
        part = build_microbatch(batch, indices, multiple, CPU, (rank, size))
        assert part.input_ids.shape[1] % multiple == 0
        assert part.input_ids.shape[1] * size == part.packing.cu_seqlens_q[-1]
        assert all(length % (2 * size) == 0 for length in part.packing.cu_seqlens_q.diff())
        # What predicts a token is the token before it.
        before = whole.input_ids[0, whole.rows[part.own]]
        assert torch.equal(part.input_ids[0, part.rows], before)
        assert (targets[part.own] == -1).all()
        targets[part.own] = part.targets
        assert torch.equal(part.flat_index, whole.flat_index)
        assert torch.equal(part.values["advantages"], whole.values["advantages"])
    assert torch.equal(targets, whole.targets)


@pytest.mark.parametrize(
    ("processes", "pp", "recompute"), [(2, 1, "none"), pytest.param(4, 2, "full", marks=pytest.mark.slow)]
)
def test_logprobs_and_gradients_equal_transformers(processes: int, pp: int, recompute: str, tmp_path: Path) -> None:
    folder = make_models(tmp_path)["llama"]
    logprobs, gradients = likelihood(folder)
    run_workers("tests.models.layout_worker", processes, folder, str(pp), "2", "1", recompute, tmp_path)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=False) for rank in range(processes)]
    for rank in ranks:
        torch.testing.assert_close(rank["logprobs"], logprobs, atol=1e-4, rtol=0)
    assert_gradients_equal("llama", [rank["gradients"] for rank in ranks], gradients)
    # The mean negative log-likelihood, counted once.
    assert ranks[0]["metrics"]["loss"] == pytest.approx(-float(logprobs.mean()), rel=1e-4)
