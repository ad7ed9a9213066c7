import pytest
import torch

from megatron_rl.algorithms import token_weights

LENGTHS = torch.tensor([1, 3, 0, 2])


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("token-mean", [1 / 6] * 6),
        ("seq-mean-token-sum", [1 / 3] * 6),
        ("seq-mean-token-mean", [1 / 3, 1 / 9, 1 / 9, 1 / 9, 1 / 6, 1 / 6]),
    ],
)
def test_weights_by_hand_and_empty_responses_do_not_count(aggregation, expected):
    torch.testing.assert_close(token_weights(LENGTHS, aggregation), torch.tensor(expected))


def test_the_norm_is_the_longest_response_whatever_the_others_are():
    weights = token_weights(LENGTHS, "seq-mean-token-sum-norm", longest=8)
    torch.testing.assert_close(weights, torch.full((6,), 1 / 3 / 8))
    weights = token_weights(LENGTHS, "seq-mean-token-sum-norm", KEPT, 8)
    torch.testing.assert_close(weights, torch.tensor([0, 1, 0, 1, 1, 1]) / 2 / 8)


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"])
def test_nothing_but_empty_responses_have_no_weights(aggregation):
    assert token_weights(torch.tensor([0, 0]), aggregation).tolist() == []


def test_the_weighted_sum_is_the_aggregated_loss():
    losses = torch.tensor([5.0, 1.0, 2.0, 3.0, 7.0, 9.0])
    assert (losses * token_weights(LENGTHS, "token-mean")).sum().item() == pytest.approx(27 / 6)
    assert (losses * token_weights(LENGTHS, "seq-mean-token-sum")).sum().item() == pytest.approx((5 + 6 + 16) / 3)
    assert (losses * token_weights(LENGTHS, "seq-mean-token-mean")).sum().item() == pytest.approx((5 + 2 + 8) / 3)


KEPT = torch.tensor([False, True, False, True, True, True])


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("token-mean", [0, 1 / 4, 0, 1 / 4, 1 / 4, 1 / 4]),
        ("seq-mean-token-sum", [0, 1 / 2, 0, 1 / 2, 1 / 2, 1 / 2]),
        ("seq-mean-token-mean", [0, 1 / 4, 0, 1 / 4, 1 / 4, 1 / 4]),
    ],
)
def test_rejected_tokens_and_responses_leave_the_denominator(aggregation, expected):
    # The first response is rejected whole, of the second one token.
    torch.testing.assert_close(token_weights(LENGTHS, aggregation, KEPT), torch.tensor(expected))


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"])
def test_rejected_tokens_count_as_if_they_were_not_there(aggregation):
    without = token_weights(torch.tensor([0, 2, 0, 2]), aggregation)
    torch.testing.assert_close(token_weights(LENGTHS, aggregation, KEPT)[KEPT], without)
    assert token_weights(LENGTHS, aggregation, torch.zeros(6, dtype=torch.bool)).tolist() == [0] * 6


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"])
def test_rejected_tokens_may_stay_in_the_denominator(aggregation):
    weights = token_weights(LENGTHS, aggregation, KEPT, denominator="all")
    torch.testing.assert_close(weights, token_weights(LENGTHS, aggregation) * KEPT)
    assert token_weights(LENGTHS, aggregation, torch.zeros(6, dtype=torch.bool), 1, "all").tolist() == [0] * 6
