"""Slices run only where they fit, on a clock that the tests move."""

import math

import pytest

from drafter.idle_time.slices import Durations, SliceRunner, idle_until_fit


class World:
    """Simulated time, and a source of slices that each take `length` of it."""

    size = 1

    def __init__(self, length: float, limit: float = math.inf) -> None:
        self.now, self.length, self.left = 0.0, length, limit

    def clock(self) -> float:
        return self.now

    def next(self, fits) -> "World | None":
        return self if self.left > 0 else None

    def run(self) -> None:
        self.left -= 1
        self.now += self.length

    def wait_until(self, end: float):
        """A `Pending` that ends at a time; looking costs a little."""

        def pending(seconds: float) -> bool:
            self.now = min(self.now + max(seconds, 1e-6), max(end, self.now))
            return self.now < end

        return pending


def trained(world: World) -> SliceRunner:
    runner = SliceRunner(world, clock=world.clock)
    for _ in range(3):
        runner.durations.observe(world.size, world.length)
    return runner


class Piece:
    """A part of `Divisible`: a fixed cost of 1, and 1 for each unit of size."""

    def __init__(self, world: "Divisible", size: int) -> None:
        self.world, self.size = world, size

    def run(self) -> None:
        self.world.now += 1 + self.size
        self.world.ran.append(self.size)


class Divisible(World):
    """Work that can be halved."""

    def __init__(self) -> None:
        super().__init__(length=0)
        self.ran: list[int] = []

    def next(self, fits) -> Piece:
        return Piece(self, next((size for size in (8, 4, 2) if fits(size)), 1))


def test_durations_are_medians_without_the_first_run():
    durations = Durations(window=3)
    assert durations.expected(4) == 0
    durations.observe(4, 100.0)
    assert durations.expected(4) == 0
    for seconds in (9.0, 1.0, 2.0, 3.0):
        durations.observe(4, seconds)
    assert durations.expected(4) == 2.0  # of the last three


def test_an_unknown_size_takes_the_rate_of_the_nearest_until_it_has_run():
    durations = Durations()
    for size, seconds in ((8, 9.0), (8, 9.0), (64, 64.0)):
        durations.observe(size, seconds)
    assert durations.expected(4) == 4.5 and durations.expected(60) == 60.0 and durations.expected(12) == 13.5
    durations.observe(4, 5.0)
    assert durations.expected(4) == 5.0


def test_work_is_cut_to_fit():
    world = Divisible()
    runner = SliceRunner(world, clock=world.clock)
    runner.run_until(lambda: len(world.ran) == 3)
    assert world.ran == [8, 8, 8]
    for _ in range(20):  # learns the fixed cost of small slices
        runner.run_while(world.wait_until(world.now + 6.0), expected=6.0)
    world.ran.clear()
    filled, end = runner.run_while(world.wait_until(world.now + 6.0), expected=6.0), world.now
    assert world.ran == [4] and filled.seconds(0, end) == pytest.approx(5.0)


def test_an_expected_wait_is_filled_without_overrun():
    world = World(length=2.0)
    filled = trained(world).run_while(world.wait_until(11.0), expected=11.0)
    assert len(filled.spans) == 5
    assert world.now == pytest.approx(11.0)


def test_a_slice_that_does_not_fit_does_not_run():
    world = World(length=2.0)
    assert trained(world).run_while(world.wait_until(1.5), expected=1.5).spans == []
    assert world.now == pytest.approx(1.5)


def test_an_unexpected_wait_is_filled_once_it_has_lasted_as_long_as_a_slice():
    world = World(length=2.0)
    filled = trained(world).run_while(world.wait_until(9.0), expected=0.0)
    assert filled.spans[0][0] == pytest.approx(2.0, abs=1e-3)
    assert len(filled.spans) == 4
    assert world.now <= 9.0 + 2.0


def test_a_late_wait_is_filled_again():
    world = World(length=1.0)
    filled = trained(world).run_while(world.wait_until(20.0), expected=4.0)
    assert filled.seconds(0, 20) >= 17.9


def test_the_share_bounds_what_is_filled_and_zero_fills_nothing():
    world = World(length=1.0)
    runner = trained(world)
    runner.share = 0.5
    assert len(runner.run_while(world.wait_until(10.0), expected=10.0).spans) in (4, 5)
    world = World(length=1.0)
    runner = trained(world)
    runner.share = 0.0
    assert runner.run_while(world.wait_until(100.0), expected=10.0).spans == []


def test_without_work_the_wait_goes_on_unfilled():
    world = World(length=1.0, limit=2)
    assert len(trained(world).run_while(world.wait_until(10.0), expected=10.0).spans) == 2
    assert world.now == pytest.approx(10.0)


@pytest.mark.parametrize("duration", [0.0, 0.5, 3.0])
def test_idle_until_fit_ends_in_a_fit(duration: float):
    for elapsed in (0.0, 1.0, 4.9, 5.1, 7.0, 20.0):
        idle = idle_until_fit(5.0, elapsed, duration, 0.8)
        assert idle == 0 or idle_until_fit(5.0, elapsed + idle + 1e-9, duration, 0.8) == 0


def test_a_tail_is_filled_until_the_device_is_wanted():
    world = World(length=2.0)
    filled = trained(world).run_until(lambda: world.now >= 9.0)
    assert len(filled.spans) == 5
    assert world.now <= 9.0 + 2.0


def test_a_tail_ends_before_its_deadline_or_with_the_work():
    world = World(length=2.0)
    assert len(trained(world).run_until(lambda: False, deadline=9.0).spans) == 4
    world = World(length=2.0, limit=3)
    assert len(trained(world).run_until(lambda: False).spans) == 3


def test_filled_seconds_are_counted_within_the_wait():
    world = World(length=2.0)
    filled = SliceRunner(world, clock=world.clock).run_while(world.wait_until(5.0), expected=0.0)
    assert filled.seconds(0.0, 5.0) == pytest.approx(sum(min(end, 5.0) - start for start, end in filled.spans))
