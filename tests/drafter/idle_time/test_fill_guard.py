"""The guard over scripted step times."""

import random

import pytest

from drafter.idle_time.fill_guard import FillGuard


def drive(guard: FillGuard, steps: int, cost, noise: float = 0.0, drift: float = 0.0) -> list[float]:
    """Feed steps of about 1 s, filled ones slower by `cost(share)`; returns the share after each step."""
    dice, shares = random.Random(0), []
    for step in range(steps):
        seconds = (1 + drift * step) * (1 + dice.gauss(0, noise))
        guard.observe(seconds * (1 + cost(guard.share)) if guard.fill_next() else seconds)
        shares.append(guard.share)
    return shares


def test_every_nth_step_is_unfilled():
    guard, filled = FillGuard(every=4), []
    for _ in range(9):
        filled.append(guard.fill_next())
        guard.observe(1.0)
    assert filled == [False, True, True, True] * 2 + [False]


def test_cheap_filling_keeps_the_whole_budget_under_noise():
    assert drive(FillGuard(), 500, lambda share: 0.01, noise=0.01)[-1] > 0.8


def test_costly_filling_shrinks_until_it_is_within_the_bound():
    shares = drive(FillGuard(), 600, lambda share: 0.1 * share)
    assert 0.1 * shares[-1] <= 0.035
    assert shares[-1] > 0.05


def test_filling_that_always_costs_is_given_up_and_tried_again():
    shares = drive(FillGuard(), 1000, lambda share: 0.2 if share > 0 else 0.0)
    assert 0.0 in shares
    assert shares[-50:] != [0.0] * 50


def test_the_budget_grows_back_slowly():
    guard = FillGuard()
    drive(guard, 200, lambda share: 0.1)
    low = guard.share
    shares = [low, *drive(guard, 1000, lambda share: 0.0)]
    assert shares[-1] == 1.0
    assert max(b - a for a, b in zip(shares, shares[1:], strict=False)) <= 0.05 + 1e-9


def test_outliers_do_not_shrink_the_budget():
    guard = FillGuard()
    for step in range(200):
        guard.observe(10.0 if step % 23 == 7 else 1.0)
    assert guard.share == 1.0


@pytest.mark.parametrize("drift", [0.02, -0.0005])
def test_a_drift_of_the_step_time_is_not_taken_for_a_cost(drift: float):
    assert min(drive(FillGuard(), 400, lambda share: 0.0, drift=drift)) > 0.9


def test_unequal_work_is_accounted_for():
    guard = FillGuard()
    for step in range(200):
        work = 1.0 if guard.fill_next() else 0.5
        guard.observe(2.0 * work, work)
        assert guard.share == 1.0, step


def test_a_restored_guard_goes_on_alike():
    guard, other = FillGuard(), FillGuard()
    drive(guard, 33, lambda share: 0.1)
    other.restore(guard.state())
    assert drive(guard, 100, lambda share: 0.05) == drive(other, 100, lambda share: 0.05)
    assert guard.state() == other.state()


def test_never_filling_is_refused():
    with pytest.raises(ValueError, match="every=1"):
        FillGuard(every=1)
