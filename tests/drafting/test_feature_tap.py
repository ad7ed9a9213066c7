"""What is tapped are the hidden states that transformers computes, of the tokens that they are said to be of."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from megatron_rl.drafting.feature_tap import Window, plan_windows
from megatron_rl.trainer.batch import Batch
from tests.drafting.features_worker import AUX_LAYERS, CUT, WINDOW
from tests.hf_models import make_models, random_sequences
from tests.launching import run_workers
from tests.models.parity_worker import TEMPERATURE

LAYOUTS = [
    pytest.param(1, 1, id="tp1-pp1", marks=pytest.mark.slow),
    pytest.param(2, 1, id="tp2-pp1", marks=pytest.mark.slow),
    pytest.param(1, 2, id="tp1-pp2"),
    pytest.param(2, 2, id="tp2-pp2", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = make_models(tmp_path_factory.mktemp("models"))["llama"]  # untied: both ends of the policy are gathered
    return path, AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
def test_features_equal_transformers_and_predict_the_next_token(tp: int, pp: int, model, tmp_path: Path):
    path, reference = model
    run_workers("tests.drafting.features_worker", tp * pp, path, tp, pp, tmp_path)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=False) for rank in range(tp * pp)]
    batch = Batch(*random_sequences(12))
    windows = plan_windows(batch, 3, WINDOW, 10_000, seed=0)
    assert any(window.start > 0 for window in windows)
    for packing in ("packed", "single"):
        rows = [row for rank in ranks for row in rank[packing]["rows"]]
        assert sorted(window.sequence for window, _ in rows) == sorted(window.sequence for window in windows)
        counts = [len(rank[packing]["rows"]) for rank in ranks]
        assert max(counts) - min(counts) <= 1, "every rank has its share"
        for window, row in rows:
            check_hidden_states(batch, window, row, reference)
            check_alignment(batch, window, row, ranks[-1]["policy"], ranks[0][packing]["logprobs"])
    for rank in ranks:
        assert torch.equal(rank["policy"]["embedding"], reference.model.embed_tokens.weight)
        assert torch.equal(rank["policy"]["lm_head"], reference.lm_head.weight)
        assert torch.equal(rank["cut"]["embedding"], reference.model.embed_tokens.weight)
        assert torch.equal(rank["cut"]["lm_head"], reference.lm_head.weight[:CUT])


@torch.no_grad()
def check_hidden_states(batch: Batch, window: Window, row: dict, reference) -> None:
    tokens = batch.prompts[window.sequence] + batch.responses[window.sequence]
    places = slice(window.start, window.stop)
    output = reference(torch.tensor([tokens]), output_hidden_states=True).hidden_states
    assert row["token_ids"].tolist() == tokens[places]
    assert row["cu_seqlens"].tolist() == [0, window.stop - window.start]
    assert row["response_mask"].int().sum() == len(
        tokens[max(window.start, len(batch.prompts[window.sequence])) : window.stop]
    )
    aux = torch.cat([output[layer][0, places] for layer in AUX_LAYERS], dim=-1)
    torch.testing.assert_close(row["hidden_states"], aux, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(row["final_hidden"], output[-1][0, places], atol=1e-4, rtol=1e-4)


def check_alignment(batch: Batch, window: Window, row: dict, policy: dict, logprobs: torch.Tensor) -> None:
    """The final state of a place, through the policy's head, gives the pass's log-prob of the token after it."""
    found = (F.linear(row["final_hidden"], policy["lm_head"]) / TEMPERATURE).log_softmax(-1)
    found = found[:-1].gather(1, row["token_ids"][1:, None])[:, 0][row["response_mask"][1:]]
    first = batch.offsets[window.sequence] - len(batch.prompts[window.sequence])
    places = torch.arange(first + window.start, first + window.stop)[1:][row["response_mask"][1:]]
    torch.testing.assert_close(found, logprobs[places], atol=1e-4, rtol=1e-4)


def test_windows_are_bounded_differ_by_step_and_hold_out_whole_prompts():
    prompts = [[group] * 5 for group in range(16) for _ in range(4)]
    responses = [[1] * (10 + 7 * (i % 9)) for i in range(64)]
    batch = Batch(prompts, responses)
    seen = set()
    for step in range(16):
        windows = plan_windows(batch, step, 32, 800, seed=1)
        assert windows == plan_windows(batch, step, 32, 800, seed=1)
        sizes = [window.stop - window.start for window in windows]
        assert max(sizes) == 32 and sum(sizes) <= 800
        held_out = {window.sequence // 4 for window in windows if window.held_out}
        assert held_out and not held_out & {window.sequence // 4 for window in windows if not window.held_out}
        seen |= {(window.sequence, window.start) for window in windows}
    starts = {start for sequence, start in seen if len(responses[sequence]) == 66}
    assert len(starts) > 5 and min(starts) < 10 and max(starts) > 30, "from everywhere in a long response"


def test_responses_of_one_token_are_left_out_and_one_prompt_is_enough():
    batch = Batch([[1, 2]] * 9, [[3]] + [[3, 4, 5]] * 8)
    windows = plan_windows(batch, 1, 16, 1000, seed=0)
    assert 0 not in {window.sequence for window in windows}
    kinds = [window.held_out for window in windows]
    assert 0 < sum(kinds) < len(kinds)
