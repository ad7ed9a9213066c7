"""Controllers on scripted machines: latency and acceptance are given, and the best arm is known."""

import random
from collections import Counter
from collections.abc import Callable
from itertools import pairwise

import pytest

from megatron_rl.config import ConfigError
from rollout.speculation.acceptance_model import AcceptanceModel
from rollout.speculation.arms import PLAIN, Arm, Controller, Step, bucket_of, make_arms
from rollout.speculation.bandit import StaticController, make_controller
from rollout.speculation.epsilon_greedy import EpsilonGreedyController
from rollout.speculation.latency_model import LatencyModel
from rollout.speculation.thompson import TRIALS, ThompsonController

ARMS = make_arms(["ngram"], 8)


class Machine:
    """An engine whose step takes `base + row * rows` seconds and whose drafts are accepted with a given chance."""

    def __init__(self, base: float, row: float, accept: float, seed: int = 0, estimates: bool = True) -> None:
        self.base, self.row, self.accept, self.estimates = base, row, accept, estimates
        self.random = random.Random(seed)

    def emitted(self, batch: int, k: int) -> float:
        return batch * sum(self.accept**position for position in range(k + 1))

    def seconds(self, batch: int, k: int) -> float:
        return self.base + self.row * batch * (k + 1)

    def rate(self, batch: int, arm: Arm) -> float:
        return self.emitted(batch, arm.k) / self.seconds(batch, arm.k)

    def best(self, batch: int) -> Arm:
        return max(ARMS, key=lambda arm: self.rate(batch, arm))

    def run(self, controller: Controller, batch: int, steps: int, pause_every: int = 0) -> list[Arm]:
        """Let the controller choose for so many steps; returns its choices."""
        chosen = []
        for number in range(steps):
            expected = {}
            if self.estimates:
                expected = {arm: (batch * arm.k, self.emitted(batch, arm.k) - batch) for arm in ARMS if arm.k}
            arm = controller.choose(batch, expected)
            chosen.append(arm)
            noise = self.random.gauss(1.0, 0.03)
            seconds = self.seconds(batch, arm.k) * noise
            if pause_every and number % pause_every == 0:
                seconds += 1.0  # a garbage collection
            tried, accepted = [], []
            reach = batch
            for _ in range(arm.k):
                hits = sum(self.random.random() < self.accept for _ in range(reach))
                tried.append(reach)
                accepted.append(hits)
                reach = hits
            emitted = batch + sum(accepted)
            controller.observe(Step(arm, batch, batch * arm.k, emitted, seconds, tuple(tried), tuple(accepted)))
        return chosen


def share_of_best(machine: Machine, batch: int, chosen: list[Arm]) -> float:
    """The rate of the choices, as a share of the best arm's."""
    emitted = sum(machine.emitted(batch, arm.k) for arm in chosen)
    seconds = sum(machine.seconds(batch, arm.k) for arm in chosen)
    return emitted / seconds / machine.rate(batch, machine.best(batch))


EPSILON_GREEDY: Callable[[], Controller] = lambda: EpsilonGreedyController(ARMS, seed=1)  # noqa: E731
THOMPSON: Callable[[], Controller] = lambda: ThompsonController(ARMS, seed=1)  # noqa: E731


@pytest.mark.parametrize("make", [EPSILON_GREEDY, THOMPSON], ids=["epsilon_greedy", "thompson"])
@pytest.mark.parametrize(
    ("batch", "machine"),
    [
        (1, Machine(base=5e-3, row=1e-4, accept=0.8)),  # long drafts are nearly free
        (32, Machine(base=5e-3, row=2e-4, accept=0.5)),  # a few drafts pay
        (64, Machine(base=1e-3, row=5e-4, accept=0.2)),  # none does
    ],
)
def test_the_best_arm_is_found(make: Callable[[], Controller], batch: int, machine: Machine) -> None:
    controller = make()
    machine.run(controller, batch, 300)
    # Epsilon-greedy keeps trying arms that are far worse.
    bound = 0.97 if isinstance(controller, ThompsonController) else 0.85
    assert share_of_best(machine, batch, machine.run(controller, batch, 600)) > bound


def test_the_model_needs_few_trials(subtests: pytest.Subtests) -> None:
    for batch, accept in [(1, 0.8), (16, 0.6), (64, 0.1)]:
        with subtests.test(batch=batch):
            machine = Machine(base=5e-3, row=2e-4, accept=accept)
            assert share_of_best(machine, batch, machine.run(THOMPSON(), batch, 60)) > 0.9


def test_the_model_learns_acceptance_where_the_drafter_cannot_tell() -> None:
    machine = Machine(base=5e-3, row=1e-4, accept=0.85, estimates=False)
    controller = THOMPSON()
    machine.run(controller, 2, 200)
    assert share_of_best(machine, 2, machine.run(controller, 2, 200)) > 0.95


@pytest.mark.parametrize("make", [EPSILON_GREEDY, THOMPSON], ids=["epsilon_greedy", "thompson"])
def test_a_change_is_followed(make: Callable[[], Controller]) -> None:
    controller, machine = make(), Machine(base=5e-3, row=2e-4, accept=0.9)
    machine.run(controller, 8, 300)
    machine.accept, machine.row = 0.05, 1e-3
    machine.run(controller, 8, 2500)
    assert share_of_best(machine, 8, machine.run(controller, 8, 600)) > 0.88


@pytest.mark.parametrize("make", [EPSILON_GREEDY, THOMPSON], ids=["epsilon_greedy", "thompson"])
def test_pauses_do_not_change_the_choice(make: Callable[[], Controller]) -> None:
    controller, machine = make(), Machine(base=5e-3, row=1e-4, accept=0.8)
    machine.run(controller, 4, 400, pause_every=17)
    assert share_of_best(machine, 4, machine.run(controller, 4, 600, pause_every=17)) > 0.88


@pytest.mark.parametrize("make", [EPSILON_GREEDY, THOMPSON], ids=["epsilon_greedy", "thompson"])
def test_buckets_do_not_share_their_choice(make: Callable[[], Controller]) -> None:
    controller = make()
    wide, narrow = Machine(1e-3, 5e-4, 0.3), Machine(1e-2, 1e-5, 0.9)
    for _ in range(40):  # the live batch goes to and fro
        wide.run(controller, 64, 20)
        narrow.run(controller, 1, 20)
    assert share_of_best(wide, 64, wide.run(controller, 64, 40)) > 0.95
    assert share_of_best(narrow, 1, narrow.run(controller, 1, 40)) > 0.95


def test_small_gains_do_not_make_it_switch() -> None:
    # k = 2 and k = 4 are within 1 % of each other here.
    machine = Machine(base=5e-3, row=1.92e-4, accept=0.42)
    assert abs(machine.rate(4, Arm("ngram", 1)) / machine.rate(4, Arm("ngram", 2)) - 1) < 0.02
    controller = THOMPSON()
    machine.run(controller, 4, 300)
    chosen = machine.run(controller, 4, 300)
    switches = sum(a != b for a, b in pairwise(chosen))
    assert switches < 15


def test_choices_are_counted_per_bucket() -> None:
    controller = StaticController(Arm("ngram", 4))
    for batch in (1, 3, 4, 64):
        controller.choose(batch, {})
    arm = Arm("ngram", 4)
    assert controller.counts == {(1, arm): 1, (4, arm): 2, (64, arm): 1}


def test_buckets_are_powers_of_two() -> None:
    assert [bucket_of(batch) for batch in (1, 2, 3, 4, 5, 8, 9, 64, 65)] == [1, 2, 4, 4, 8, 8, 16, 64, 128]


@pytest.mark.parametrize("kind", ["epsilon_greedy", "thompson"])
def test_a_restored_controller_goes_on_with_what_was_learned(kind: str) -> None:
    import json

    machine = Machine(base=5e-3, row=1e-4, accept=0.8)
    learned = make_controller(kind, ["ngram"], 8)
    machine.run(learned, 2, 400)
    fresh = make_controller(kind, ["ngram"], 8)
    fresh.restore(json.loads(json.dumps(learned.state())))
    assert fresh.state() == learned.state()
    assert share_of_best(machine, 2, machine.run(fresh, 2, 40)) > 0.95


def test_plain_is_always_an_arm_and_the_limit_too() -> None:
    assert [arm.k for arm in make_arms(["ngram"], 6)] == [0, 1, 2, 4, 6]
    assert [str(arm) for arm in make_arms(["a", "b"], 1)] == ["plain", "a:1", "b:1"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_arms([], 4), "must name each drafter once"),
        (lambda: make_arms(["ngram", "ngram"], 4), "must name each drafter once"),
        (lambda: make_arms(["ngram"], 0), "max_draft_tokens=0"),
        (lambda: EpsilonGreedyController([Arm("ngram", 2)]), "must include plain decoding"),
        (lambda: ThompsonController([PLAIN, PLAIN]), "given twice"),
        (lambda: EpsilonGreedyController(ARMS, epsilon=2), "epsilon=2"),
        (lambda: make_controller("best", ["ngram"], 4), "adaptive='best' is not one of"),
    ],
)
def test_bad_configurations_are_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_acceptance_is_per_position_and_fades() -> None:
    acceptance, draw = AcceptanceModel(), random.Random(0)
    for _ in range(2000):
        acceptance.observe([10, 8], [8, 2])
    mean = sum(acceptance.expected(2, draw) for _ in range(500)) / 500
    assert mean == pytest.approx(0.8 + 0.8 * 0.25, abs=0.02)
    for _ in range(2000):
        acceptance.observe([10, 1], [1, 0])
    assert sum(acceptance.expected(1, draw) for _ in range(500)) / 500 == pytest.approx(0.1, abs=0.02)


def test_latency_is_predicted_for_sizes_that_were_not_seen() -> None:
    model = LatencyModel()
    for batch in (1, 8, 64):
        for drafted in (0, batch, 4 * batch):
            for _ in range(5):
                model.observe("ngram", batch, drafted, 4e-3 + 5e-5 * batch + 2e-5 * drafted)
    for batch, drafted in [(16, 32), (32, 0), (3, 9)]:
        seconds, _ = model.predict("ngram", batch, drafted)
        assert seconds == pytest.approx(4e-3 + 5e-5 * batch + 2e-5 * drafted, rel=0.05)
    assert model.seconds_per_row() == pytest.approx(2e-5, rel=0.05)


def test_one_slow_step_does_not_move_the_latency() -> None:
    model = LatencyModel()
    for number in range(40):
        model.observe("ngram", 8, 8, 5.0 if number == 11 else 5e-3)
    assert model.predict("ngram", 8, 8)[0] == pytest.approx(5e-3, rel=0.05)


def test_an_old_measurement_is_doubted() -> None:
    model = LatencyModel()
    for _ in range(30):
        model.observe("none", 8, 0, 5e-3)
    _, fresh = model.predict("none", 8, 0)
    for _ in range(3000):
        model.observe("ngram", 8, 32, 8e-3)
    _, stale = model.predict("none", 8, 0)
    assert stale > 2 * fresh


def test_drafts_are_tried_a_few_times_in_each_bucket_even_where_their_forecast_is_bad() -> None:
    controller, machine = THOMPSON(), Machine(base=1e-3, row=1e-3, accept=0.01)
    chosen = {batch: machine.run(controller, batch, 200) for batch in (4, 64)}
    for arms in chosen.values():
        drafted = sum(arm.k > 0 for arm in arms)
        assert TRIALS <= drafted < 12
    assert controller.knows(4) and controller.knows(64) and not controller.knows(16)


class TwoDrafters:
    """N-gram drafts are free, rarely right, and say so; a head takes time for each of its tokens and cannot tell."""

    def __init__(self, head_accept: float, seed: int = 0) -> None:
        self.accept = {"ngram": 0.3, "eagle": head_accept}
        self.random = random.Random(seed)

    def run(self, controller: Controller, batch: int, steps: int) -> list[Arm]:
        chosen = []
        for _ in range(steps):
            expected = {arm: (batch * arm.k, batch * self._fraction("ngram", arm.k)) for arm in ARMS if arm.k}
            arm = controller.choose(batch, expected)
            chosen.append(arm)
            tried = [round(batch * self.accept.get(arm.drafter, 0.0) ** position) for position in range(arm.k + 1)]
            seconds = 4e-3 + 1e-4 * batch * (arm.k + 1) + (5e-4 * arm.k if arm.drafter == "eagle" else 0.0)
            positions = (tuple(tried[:-1]), tuple(tried[1:])) if arm.drafter == "eagle" else ()
            emitted = batch + sum(tried[1:])
            controller.observe(
                Step(arm, batch, batch * arm.k, emitted, seconds * self.random.gauss(1.0, 0.03), *positions)
            )
        return chosen

    def _fraction(self, drafter: str, k: int) -> float:
        return sum(self.accept[drafter] ** (position + 1) for position in range(k))


def drafters_of(chosen: list[Arm]) -> Counter[str]:
    return Counter(arm.drafter for arm in chosen)


def test_the_better_of_two_drafters_is_found_where_each_pays() -> None:
    controller = make_controller("thompson", ["eagle", "ngram"], 8)
    machine = TwoDrafters(head_accept=0.85)
    for batch in (64, 16, 2):
        machine.run(controller, batch, 150)
    # 2 requests: 4.2 ms for one token each; the head's 8 drafts take 9.8 ms for 4.4 tokens.
    assert drafters_of(machine.run(controller, 2, 200))["eagle"] > 180
    machine.accept["eagle"] = 0.02
    machine.run(controller, 2, 400)
    assert drafters_of(machine.run(controller, 2, 200))["eagle"] < 20


def test_a_useless_head_is_left_alone_until_it_is_another_one() -> None:
    controller = make_controller("thompson", ["eagle", "ngram"], 8)
    machine = TwoDrafters(head_accept=0.0)
    assert 1 <= drafters_of(machine.run(controller, 64, 100))["eagle"] < 20
    assert drafters_of(machine.run(controller, 2, 200))["eagle"] < 12  # where its cost is a guess, and the gain 0
    machine.accept["eagle"] = 0.9
    assert drafters_of(machine.run(controller, 2, 200))["eagle"] == 0, "nothing says that it has changed"
    controller.renew("eagle")
    assert drafters_of(machine.run(controller, 2, 200))["eagle"] > 150


@pytest.mark.parametrize("kind", ["epsilon_greedy", "thompson"])
def test_an_arm_that_would_draft_nothing_is_not_chosen(kind: str) -> None:
    controller = make_controller(kind, ["eagle"], 4)
    nothing = {arm: (0.0, 0.0) for arm in make_arms(["eagle"], 4) if arm.k}
    for _ in range(50):
        assert controller.choose(2, nothing) == PLAIN
        controller.observe(Step(PLAIN, 2, 0, 2, 4e-3))
    assert controller.choose(1, {}).drafter == "eagle" or kind == "epsilon_greedy"
