import math

import pytest
import torch

from megatron_rl.algorithms import TokenCorrection, correct_mismatch, mismatch_metrics
from megatron_rl.config.algorithm import CorrectionConfig

# Responses of 2, 3, 0 and 1 tokens.
LENGTHS = torch.tensor([2, 3, 0, 1])
RATIOS = torch.tensor([2.0, 0.5, 3.0, 1.0, 1.5, 0.25], dtype=torch.float64)
ROLLOUT = torch.tensor([0.25, 0.4, 0.3, 0.1, 0.2, 0.8], dtype=torch.float64).log()
OLD = ROLLOUT + RATIOS.log()
FORMS = {
    "none": CorrectionConfig(kind="none"),
    "token-tis": CorrectionConfig(cap=2.5),
    "sequence-tis": CorrectionConfig(level="sequence", cap=2.5),
    "token-mask": CorrectionConfig(kind="mask", cap=2.5, floor=0.4),
    "sequence-mask": CorrectionConfig(kind="mask", level="sequence", cap=2.5, floor=0.5),
    "geometric-mask": CorrectionConfig(kind="mask", level="geometric", cap=1.5, floor=0.5),
    "veto": CorrectionConfig(kind="none", veto=0.3),
}
# Products: 1, 4.5, -, 0.25. Geometric means: 1, 1.65, -, 0.25.
EXPECTED = {
    "none": [1, 1, 1, 1, 1, 1],
    "token-tis": [2, 0.5, 2.5, 1, 1.5, 0.25],
    "sequence-tis": [1, 1, 2.5, 2.5, 2.5, 0.25],
    "token-mask": [2, 0.5, 0, 1, 1.5, 0],
    "sequence-mask": [1, 1, 0, 0, 0, 0],
    "geometric-mask": [1, 1, 0, 0, 0, 0],
    "veto": [1, 1, 1, 1, 1, 0],
}


def _correct(correction, old=OLD, rollout=ROLLOUT, lengths=LENGTHS):
    return correct_mismatch(old, rollout, lengths, correction)


@pytest.mark.parametrize("form", FORMS)
def test_weights_and_rejections_by_hand(form):
    corrected = _correct(FORMS[form])
    expected = torch.tensor(EXPECTED[form], dtype=torch.float64)
    torch.testing.assert_close(corrected.weights, expected)
    assert corrected.kept.tolist() == (expected > 0).tolist()


def test_a_mask_without_floor_rejects_only_large_ratios():
    assert _correct(CorrectionConfig(kind="mask", cap=1.75)).kept.tolist() == [False, True, False, True, True, True]
    geometric = _correct(CorrectionConfig(kind="mask", level="geometric", cap=2.0)).weights
    assert geometric.tolist() == pytest.approx([1, 1, *[4.5 ** (1 / 3)] * 3, 0.25])


def test_the_bounds_themselves_are_kept():
    old, rollout = torch.tensor([-1.0, -0.5, -2.0]), torch.full((3,), -1.0)
    bounds = CorrectionConfig(kind="mask", cap=1.0, floor=1.0)
    assert _correct(bounds, old, rollout, torch.tensor([3])).kept.tolist() == [True, False, False]


@pytest.mark.parametrize("kind", ["none", "tis", "mask"])
def test_one_vetoed_token_rejects_its_response_and_no_other(kind):
    corrected = _correct(CorrectionConfig(kind=kind, cap=5.0, veto=0.75))
    assert corrected.vetoed.tolist() == [True, False, False, True]
    assert corrected.kept.tolist() == [False, False, True, True, True, False]
    assert corrected.weights[~corrected.kept].tolist() == [0, 0, 0]


def test_a_veto_below_the_bound_of_log_ratios_still_works():
    old, rollout = torch.tensor([-30.0, -15.0]), torch.tensor([-1.0, -1.0])
    corrected = _correct(CorrectionConfig(veto=1e-10), old, rollout, torch.tensor([1, 1]))
    assert corrected.kept.tolist() == [False, True]


def test_normalized_weights_have_mean_1_over_what_is_kept():
    tokens = _correct(CorrectionConfig(cap=2.5, normalize=True)).weights
    torch.testing.assert_close(tokens, torch.tensor([2, 0.5, 2.5, 1, 1.5, 0.25], dtype=torch.float64) * 6 / 7.75)
    masked = _correct(CorrectionConfig(kind="mask", cap=2.5, floor=0.4, normalize=True)).weights
    torch.testing.assert_close(masked, torch.tensor([2, 0.5, 0, 1, 1.5, 0], dtype=torch.float64) * 4 / 5)
    # Three responses with weights 1, 2.5, 0.25: each counts once, however long it is; the empty one does not.
    responses = _correct(CorrectionConfig(level="sequence", cap=2.5, normalize=True)).weights
    torch.testing.assert_close(responses, torch.tensor([1, 1, 2.5, 2.5, 2.5, 0.25], dtype=torch.float64) * 3 / 3.75)
    vetoed = _correct(CorrectionConfig(level="sequence", cap=2.5, veto=0.3, normalize=True)).weights
    torch.testing.assert_close(vetoed, torch.tensor([1, 1, 2.5, 2.5, 2.5, 0], dtype=torch.float64) * 2 / 3.5)


ALL_FORMS = [*FORMS.values(), *(form.model_copy(update={"normalize": True}) for form in FORMS.values())]


@pytest.mark.parametrize("correction", ALL_FORMS)
def test_equal_log_probs_change_nothing(correction):
    corrected = _correct(correction, OLD.float(), OLD.float())
    assert corrected.weights.tolist() == [1.0] * 6
    assert corrected.kept.all()
    assert corrected.metrics() == {
        "weight_mean": 1.0,
        "clipped_fraction": 0.0,
        "rejected_fraction": 0.0,
        "vetoed_fraction": 0.0,
    }


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_huge_ratio_gives_exactly_the_cap(level):
    corrected = _correct(CorrectionConfig(level=level, cap=8.0), torch.zeros(6), torch.full((6,), -1e4))
    assert corrected.weights.tolist() == [8.0] * 6
    assert corrected.clipped.all()


@pytest.mark.parametrize("correction", ALL_FORMS)
def test_no_gradient_flows_through_a_weight(correction):
    old, rollout = OLD.clone().requires_grad_(), ROLLOUT.clone().requires_grad_()
    assert not _correct(correction, old, rollout).weights.requires_grad


@pytest.mark.parametrize("correction", ALL_FORMS)
def test_no_tokens_and_only_rejected_tokens_give_no_nan(correction):
    nothing = _correct(correction, torch.empty(0), torch.empty(0), torch.tensor([0, 0]))
    assert nothing.weights.tolist() == []
    assert nothing.metrics() == {
        "weight_mean": 1.0,
        "clipped_fraction": 0.0,
        "rejected_fraction": 0.0,
        "vetoed_fraction": 0.0,
    }
    strict = correction.model_copy(update={"veto": 0.5})
    rejected = _correct(strict, torch.full((6,), -100.0), torch.zeros(6))
    assert rejected.weights.tolist() == [0.0] * 6
    assert rejected.metrics() == {
        "weight_mean": 1.0,
        "clipped_fraction": 0.0,
        "rejected_fraction": 1.0,
        "vetoed_fraction": 0.75,
    }


def test_correction_metrics_by_hand():
    # Response 4 is vetoed, and token 3 is cut.
    assert _correct(CorrectionConfig(cap=2.5, veto=0.3)).metrics() == pytest.approx(
        {"weight_mean": 7.5 / 5, "clipped_fraction": 1 / 6, "rejected_fraction": 1 / 6, "vetoed_fraction": 1 / 4}
    )
    assert _correct(FORMS["token-mask"]).metrics() == pytest.approx(
        {"weight_mean": 5 / 4, "clipped_fraction": 0, "rejected_fraction": 2 / 6, "vetoed_fraction": 0}
    )


def test_mismatch_metrics_by_hand():
    log2, log3 = math.log(2), math.log(3)
    assert mismatch_metrics(OLD[:4], ROLLOUT[:4]) == pytest.approx(
        {
            "mean_abs": (log2 + log2 + log3 + 0) / 4,
            "max_abs": log3,
            "kl": ((2 - 1 - log2) + (0.5 - 1 + log2) + (3 - 1 - log3) + 0) / 4,
            "ess": 6.5**2 / (4 * (4 + 0.25 + 9 + 1)),
        }
    )


def test_equal_log_probs_have_no_mismatch():
    logprobs = torch.tensor([-1.0, -0.1])
    assert mismatch_metrics(logprobs, logprobs) == {"mean_abs": 0.0, "max_abs": 0.0, "kl": 0.0, "ess": 1.0}


def test_tiny_differences_do_not_drown_in_float32_rounding():
    rollout = torch.full((1000,), -1.0)
    delta = (rollout + 1e-5).double() - rollout.double()
    kl = mismatch_metrics(rollout + 1e-5, rollout)["kl"]
    assert kl == pytest.approx((delta**2 / 2).mean().item(), rel=1e-3)


def test_no_tokens_are_no_mismatch():
    assert mismatch_metrics(torch.empty(0), torch.empty(0))["ess"] == 1.0


# Of the first response the second token was kept from history, of the second one the first two.
REUSED = torch.tensor([0.0, 1, 1, 1, 0, 0])
REUSED_EXPECTED = {
    ("token-tis", "correct"): [2, 0.5, 2.5, 1, 1.5, 0.25],
    ("token-tis", "leave"): [2, 1, 1, 1, 1.5, 0.25],
    ("token-tis", "mask"): [2, 0, 0, 0, 1.5, 0.25],
    ("sequence-tis", "correct"): [1, 1, 2.5, 2.5, 2.5, 0.25],
    ("sequence-tis", "leave"): [2, 2, 1.5, 1.5, 1.5, 0.25],
    ("sequence-tis", "mask"): [2, 0, 0, 0, 1.5, 0.25],
    ("token-mask", "leave"): [2, 1, 1, 1, 1.5, 0],
    ("token-mask", "mask"): [2, 0, 0, 0, 1.5, 0],
    ("none", "mask"): [1, 0, 0, 0, 1, 1],
}


@pytest.mark.parametrize(("form", "treatment"), REUSED_EXPECTED)
def test_tokens_kept_from_history_are_treated_as_asked(form, treatment):
    correction = FORMS[form].model_copy(update={"reused": treatment})
    corrected = correct_mismatch(OLD, ROLLOUT, LENGTHS, correction, REUSED)
    expected = torch.tensor(REUSED_EXPECTED[form, treatment], dtype=torch.float64)
    torch.testing.assert_close(corrected.weights, expected)
    assert corrected.kept.tolist() == (expected > 0).tolist()
    assert not (corrected.clipped & ~corrected.kept).any()
    # Without such tokens the treatment has no meaning.
    fresh = correct_mismatch(OLD, ROLLOUT, LENGTHS, correction, torch.zeros(6))
    torch.testing.assert_close(fresh.weights, torch.tensor(EXPECTED[form], dtype=torch.float64))


def test_parts_make_up_the_whole_and_keep_their_own_normalization():
    correction = CorrectionConfig(kind="tis", cap=2.0, normalize=True)
    half = len(LENGTHS) // 2
    cut = int(LENGTHS[:half].sum())
    parts = [
        correct_mismatch(OLD[:cut], ROLLOUT[:cut], LENGTHS[:half], correction),
        correct_mismatch(OLD[cut:], ROLLOUT[cut:], LENGTHS[half:], correction),
    ]
    whole = TokenCorrection.of_all(parts)
    assert torch.equal(whole.weights, torch.cat([part.weights for part in parts]))
    assert len(whole.kept) == len(OLD) and len(whole.vetoed) == len(LENGTHS)
    assert not torch.allclose(whole.weights, correct_mismatch(OLD, ROLLOUT, LENGTHS, correction).weights)
