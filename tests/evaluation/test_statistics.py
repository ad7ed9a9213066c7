"""Accuracies and intervals, against numbers worked out by hand or by counting all cases."""

import itertools

import pytest

from megatron_rl.evaluation.results import Outcome, ProblemResult
from megatron_rl.evaluation.statistics import draws, estimate, majority_at_k, pass_at_k, summarize, wilson


def outcome(answer: str | None, correct: bool) -> Outcome:
    return Outcome("text", answer, correct, 3, "stop")


def problem(name: str, greedy: bool, samples: str) -> ProblemResult:
    """`samples` holds the answers, of which `r` is right and `-` is none."""
    outcomes = [outcome(None if answer == "-" else answer, answer == "r") for answer in samples]
    return ProblemResult(name, "prompt", "r", outcome("r", greedy), outcomes)


@pytest.mark.parametrize("n", [1, 4, 7])
def test_pass_at_k_is_the_share_of_all_subsets_with_a_right_response(n: int) -> None:
    for correct, k in itertools.product(range(n + 1), range(1, n + 1)):
        responses = [True] * correct + [False] * (n - correct)
        subsets = list(itertools.combinations(responses, k))
        assert pass_at_k(n, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_by_hand() -> None:
    assert pass_at_k(4, 1, 2) == pytest.approx(0.5)  # 3 of 6 pairs hold the right one
    assert pass_at_k(200, 0, 100) == 0.0
    assert pass_at_k(200, 1, 100) == pytest.approx(0.5)


@pytest.mark.parametrize(("n", "correct", "k"), [(4, 5, 1), (4, -1, 1), (4, 1, 0), (4, 1, 5)])
def test_pass_at_k_of_impossible_counts_is_refused(n: int, correct: int, k: int) -> None:
    with pytest.raises(ValueError, match="needs 0 <= correct <= n"):
        pass_at_k(n, correct, k)


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        ("rra", 1.0),
        ("raa", 0.0),
        ("ra", 0.5),  # a tie
        ("r--", 1.0),  # no answer, no vote
        ("---", 0.0),
        ("rrbbc", 0.5),
    ],
)
def test_the_majority_decides(samples: str, expected: float) -> None:
    assert majority_at_k(problem("p", True, samples).samples, len(samples), "p") == expected


def test_the_majority_of_fewer_is_a_mean_over_subsets_and_reproducible() -> None:
    samples = problem("p", True, "rrrab").samples
    subsets = list(itertools.combinations(samples, 3))
    exact = sum(majority_at_k(subset, 3, "") for subset in subsets) / len(subsets)
    assert 0 < exact < 1
    assert majority_at_k(samples, 3, "p") == pytest.approx(exact, abs=0.1)
    assert majority_at_k(samples, 3, "p") == majority_at_k(samples, 3, "p")


def test_wilson_by_its_published_example_and_at_the_ends() -> None:
    low, high = wilson(81 / 263, 263)  # Newcombe 1998, table I, method 3: 0.2553 to 0.3662
    assert (low, high) == (pytest.approx(0.2553, abs=5e-5), pytest.approx(0.3662, abs=5e-5))
    assert wilson(0.0, 30) == (0.0, pytest.approx(0.1135, abs=5e-4))
    assert wilson(1.0, 30)[1] == 1.0 and wilson(1.0, 30)[0] < 0.9


def test_yes_and_no_count_as_the_problems_that_they_are() -> None:
    values = [1.0] * 6 + [0.0] * 14
    measured = estimate(values, 8)
    assert measured.value == pytest.approx(0.3)
    assert (measured.low, measured.high) == pytest.approx(wilson(0.3, 20))


def test_values_that_vary_less_give_a_narrower_interval_but_not_below_one_per_response() -> None:
    mixed = estimate([0.25, 0.75] * 10, 4)
    assert (mixed.low, mixed.high) == pytest.approx(wilson(0.5, 80))  # variance 1/16 instead of 1/4: 4 x 20
    equal = estimate([0.5] * 20, 4)
    assert (equal.low, equal.high) == pytest.approx(wilson(0.5, 80))


def test_a_set_where_everything_failed_still_has_an_interval() -> None:
    measured = estimate([0.0] * 30, 16)
    assert measured.value == measured.low == 0
    assert measured.high == pytest.approx(wilson(0.0, 30)[1])


def test_a_summary_has_every_measure() -> None:
    problems = [problem("a", True, "rrrr"), problem("b", False, "raab"), problem("c", False, "aaaa")]
    summary = summarize(problems)
    assert list(summary) == ["greedy_accuracy", "avg@4", "pass@2", "pass@4", "majority@2", "majority@4"]
    values = {name: measure.value for name, measure in summary.items()}
    assert values["greedy_accuracy"] == pytest.approx(1 / 3)
    assert values["avg@4"] == pytest.approx((1 + 0.25 + 0) / 3)
    assert values["pass@2"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert values["pass@4"] == pytest.approx(2 / 3)
    assert values["majority@4"] == pytest.approx(1 / 3)
    assert all(measure.low <= measure.value <= measure.high for measure in summary.values())


def test_without_samples_there_is_greedy_accuracy_alone() -> None:
    assert list(summarize([problem("a", True, "")])) == ["greedy_accuracy"]


def test_problems_with_different_numbers_of_responses_are_refused() -> None:
    with pytest.raises(ValueError, match="equal numbers"):
        summarize([problem("a", True, "r"), problem("b", True, "rr")])


@pytest.mark.parametrize(("k", "expected"), [(1, [1]), (2, [2]), (6, [2, 4, 6]), (16, [2, 4, 8, 16])])
def test_draws_are_powers_of_two_and_all(k: int, expected: list[int]) -> None:
    assert draws(k) == expected
