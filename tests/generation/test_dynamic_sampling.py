"""Dynamic sampling: which prompts a step learns from does not depend on what is ready first."""

import random
import threading

import pytest

from megatron_rl.data.prompts import Prompt
from megatron_rl.generation.dynamic_sampling import DynamicSampling
from megatron_rl.generation.groups import Group
from megatron_rl.rewards.score import Score
from rollout.types import Rollout, RolloutRequest

SAMPLES = 3
# Rewards of the groups in the order of the data. 0, 2, 3, 5, 6 and 8 have no difference.
REWARDS = [(1, 1, 1), (0, 1, 0), (0, 0, 0), (1, 1, 1), (1, 0, 1), (0, 0, 0), (1, 1, 1), (0, 0, 1), (0, 0, 0), (1, 0, 0)]
REWARDS += [(0, 0, 0)] * 20


def make_group(number: int) -> Group:
    requests = [RolloutRequest(f"p{number % 4}", sample, number // 4, 0, [1], 8, 1.0) for sample in range(SAMPLES)]
    return Group(Prompt(f"p{number % 4}", [1], "", "", ""), requests)


def number_of(item: RolloutRequest | Rollout) -> int:
    return int(item.prompt_id[1:]) + 4 * item.epoch


def answer(request: RolloutRequest) -> Rollout:
    return Rollout(request.prompt_id, request.sample_index, request.epoch, 0, [1], [2], [-1.0], "stop", 0)


def score(group: Group) -> list[Score]:
    assert sorted(group.rollouts) == list(range(SAMPLES))
    return [Score(float(value)) for value in REWARDS[number_of(group.requests[0])]]


def drive(sampling: DynamicSampling, draw: random.Random) -> int:
    """What a fleet does, finishing requests in any order; returns how many there were."""
    running = [request for group in sampling.groups for request in group.requests]
    finished = 0
    while True:
        further = sampling.more(idle=not running)
        running += [request for requests in further for request in requests]
        if not running:
            return finished
        for _ in range(draw.randint(1, 4)):
            if running:
                sampling.add(answer(running.pop(draw.randrange(len(running)))))
                finished += 1


@pytest.mark.parametrize("seed", range(20))
def test_the_first_prompts_that_differ_are_chosen_whatever_the_order(seed: int):
    with DynamicSampling(3, 20, make_group, score) as sampling:
        # Groups 1, 4 and 7 differ; 0, 2, 3, 5 and 6 before them do not. None after 7 is asked for.
        assert drive(sampling, random.Random(seed)) == 8 * SAMPLES
    assert [number_of(group.requests[0]) for group in sampling.groups] == list(range(8))
    assert [number_of(group.requests[0]) for group in sampling.chosen()] == [1, 4, 7]
    assert [[score.value for score in group.scores] for group in sampling.chosen()] == [[0, 1, 0], [1, 0, 1], [0, 0, 1]]
    assert sampling.metrics() == {
        "sampling/prompts": 8,
        "sampling/dropped_fraction": 5 / 8,
        "sampling/filled_prompts": 0,
    }


@pytest.mark.parametrize("seed", range(5))
def test_at_the_limit_the_first_of_the_others_fill_the_batch(seed: int):
    with DynamicSampling(4, 6, make_group, score) as sampling:
        assert drive(sampling, random.Random(seed)) == 6 * SAMPLES
    # Of 0 to 5, 1 and 4 differ; 0 and 2 are the first ones of the others.
    assert [number_of(group.requests[0]) for group in sampling.chosen()] == [0, 1, 2, 4]
    assert sampling.metrics()["sampling/filled_prompts"] == 2


def test_a_step_whose_prompts_all_differ_asks_for_no_more():
    def differing(group: Group) -> list[Score]:
        return [Score(float(i)) for i in range(SAMPLES)]

    with DynamicSampling(3, 12, make_group, differing) as sampling:
        assert drive(sampling, random.Random(0)) == 3 * SAMPLES
    assert sampling.chosen() == sampling.groups


def test_penalties_are_no_difference():
    def penalized(group: Group) -> list[Score]:
        return [Score(0.0, penalty=-0.1 * i) for i in range(SAMPLES)]

    with DynamicSampling(1, 2, make_group, penalized) as sampling:
        drive(sampling, random.Random(0))
    assert len(sampling.groups) == 2
    assert sampling.metrics()["sampling/dropped_fraction"] == 1


def test_a_slow_reward_keeps_the_engines_busy_and_idle_engines_wait_for_it():
    release = threading.Event()

    def slow(group: Group) -> list[Score]:
        assert release.wait(30)
        return score(group)

    with DynamicSampling(2, 3, make_group, slow) as sampling:
        first, second = (group.requests for group in sampling.groups)
        for request in first:
            sampling.add(answer(request))
        assert sampling.more(idle=False) == [], "the score is not there yet, but the engines have work"
        for request in second:
            sampling.add(answer(request))
        threading.Timer(0.05, release.set).start()
        (third,) = sampling.more(idle=True)
        assert {number_of(request) for request in third} == {2}
        for request in third:
            sampling.add(answer(request))
        assert sampling.more(idle=True) == []
        assert all(group.scores for group in sampling.groups)


def test_an_error_while_scoring_reaches_the_caller():
    def broken(group: Group) -> list[Score]:
        raise RuntimeError("no tokenizer")

    with DynamicSampling(1, 2, make_group, broken) as sampling, pytest.raises(RuntimeError, match="no tokenizer"):
        drive(sampling, random.Random(0))
