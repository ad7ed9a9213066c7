import pytest

from megatron_rl.config.sections import ArithmeticConfig
from megatron_rl.data.arithmetic import arithmetic_problem, arithmetic_problems, is_heldout, worked_steps
from megatron_rl.rewards.builtin import last_number

MIXED = ArithmeticConfig(digits=4, min_doublings=1, max_doublings=5, direct_fraction=0.5, train_size=600, eval_size=300)


def _numbers(problem):
    number, factor = problem.prompt.removesuffix("?").split("*")
    return int(number), int(factor)


def test_steps_by_hand():
    assert worked_steps(437, 3, 5) == "00874*04,01748*02,03496*01,"
    assert worked_steps(9, 1, 2) == "18*01,"


@pytest.mark.parametrize("heldout", [False, True])
def test_every_demonstration_reaches_the_right_answer_by_valid_steps(heldout):
    for problem in arithmetic_problems(MIXED, 0, heldout):
        number, factor = _numbers(problem)
        assert int(problem.answer) == number * factor == last_number(problem.response)
        *steps, answer = problem.response.split(",")
        assert answer == f"={int(problem.answer):04d}"
        for step in steps:
            assert len(step) == 7
            doubled, left = step.split("*")
            assert int(doubled) * int(left) == number * factor


def test_problems_are_a_function_of_seed_and_index():
    problems = arithmetic_problems(MIXED, 5, heldout=False)
    assert problems == arithmetic_problems(MIXED, 5, heldout=False)
    assert problems[123] == arithmetic_problem(MIXED, 5, 123, heldout=False)
    assert problems != arithmetic_problems(MIXED, 6, heldout=False)
    assert len({problem.prompt for problem in problems}) > 450


def test_no_heldout_product_is_a_training_problem_whatever_the_seed():
    heldout = {_numbers(problem) for problem in arithmetic_problems(MIXED, 1, heldout=True)}
    train = {_numbers(problem) for seed in range(5) for problem in arithmetic_problems(MIXED, seed, heldout=False)}
    assert heldout and train
    assert not heldout & train
    assert all(is_heldout(number, factor.bit_length() - 1) for number, factor in heldout)


def test_sizes_and_doublings_are_as_configured():
    problems = arithmetic_problems(MIXED, 0, heldout=False)
    assert len(problems) == 600
    numbers, factors = zip(*map(_numbers, problems), strict=True)
    assert set(factors) == {2, 4, 8, 16, 32}
    assert all(1 <= number * factor < 10**4 for number, factor in zip(numbers, factors, strict=True))


@pytest.mark.parametrize(("share", "low", "high"), [(0.0, 0, 0), (0.5, 240, 360), (1.0, 600, 600)])
def test_the_share_of_direct_answers_is_as_configured(share, low, high):
    problems = arithmetic_problems(MIXED.model_copy(update={"direct_fraction": share}), 0, heldout=False)
    assert low <= sum(problem.response.startswith("=") for problem in problems) <= high


def test_default_responses_have_uneven_lengths_of_tens_of_characters():
    problems = arithmetic_problems(ArithmeticConfig(direct_fraction=0.0), 0, heldout=True)
    assert {len(problem.response) for problem in problems} == {24, 33, 42, 51, 60}
    assert len({problem.prompt for problem in problems}) > 230
