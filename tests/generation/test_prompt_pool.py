"""Prompts under way: what may begin, what a step takes, and that nothing is lost."""

import io
import random
from dataclasses import replace

import pytest
import torch

from megatron_rl.config import Config
from megatron_rl.data.prompts import Prompt
from megatron_rl.generation.groups import Group
from megatron_rl.generation.prompt_pool import Pool, staleness_metrics
from rollout.fleet.requests import key_of
from rollout.types import Rollout, RolloutRequest, TokenSource

PROMPTS, SAMPLES, LIMIT = 4, 2, 10


def make_config(steps: int = 8, **rollout: object) -> Config:
    return Config.model_validate(
        {
            "model": {"path": "m"},
            "algorithm": {"group_size": SAMPLES},
            "train": {"prompts_per_step": PROMPTS, "steps": steps},
            "rollout": {"max_tokens": LIMIT, "partial_fraction": 0.5, **rollout},
            "run_dir": "r",
        }
    )


def ask(number: int) -> Group:
    """Seven prompts in all, so that they come again in later epochs."""
    name, epoch = f"p{number % 7}", number // 7
    requests = [RolloutRequest(name, sample, epoch, 10 * number + sample, [1], LIMIT, 1.0) for sample in range(SAMPLES)]
    return Group(Prompt(name, [1], "", "", ""), requests)


def wanted_length(request: RolloutRequest) -> int:
    return 1 + (7 * (request.seed // 10) + 3 * (request.seed % 10)) % LIMIT


def respond(request: RolloutRequest, tokens: int, version: int) -> Rollout:
    """At most so many further tokens; each is a function of the seed and its place."""
    begin = len(request.partial_ids)
    end = min(begin + tokens, wanted_length(request))
    return Rollout(
        prompt_id=request.prompt_id,
        sample_index=request.sample_index,
        epoch=request.epoch,
        seed=request.seed,
        prompt_ids=request.prompt_ids,
        token_ids=[100 * request.seed + place for place in range(begin, end)],
        logprobs=[-0.1 * place for place in range(begin, end)],
        finish_reason="stop" if end == wanted_length(request) else "unfinished",
        policy_version=version,
        sources=[TokenSource.FRESH] * (end - begin),
        precisions=[("none", end - begin)],
        versions=[(version, end - begin)],
    )


def numbers(groups: list[Group]) -> list[int]:
    return [group.requests[0].seed // 10 for group in groups]


def under_way(pool: Pool) -> list[int]:
    return sorted({request.seed // 10 for request in pool.requests()})


def answer_all(pool: Pool, version: int = 0) -> None:
    for request in pool.requests():
        pool.add(respond(request, LIMIT, version))


@pytest.mark.parametrize(
    ("rollout", "at_first", "later"),
    [
        ({"async_steps": 1}, 8, 12),
        ({"async_steps": 2}, 12, 16),
        ({"partial": True}, 6, 10),
        ({"async_steps": 1, "partial": True}, 10, 14),
    ],
)
def test_prompts_begin_as_far_ahead_as_the_options_allow(rollout: dict, at_first: int, later: int) -> None:
    pool = Pool(make_config(**rollout), ask)
    pool.open(1)
    assert under_way(pool) == list(range(at_first))
    answer_all(pool)
    assert numbers(pool.take(1)) == [0, 1, 2, 3]
    pool.open(2)
    assert under_way(pool) == list(range(at_first, later))


def test_no_prompt_begins_for_a_step_after_the_last() -> None:
    pool = Pool(make_config(steps=2, async_steps=5), ask)
    pool.open(1)
    assert under_way(pool) == list(range(2 * PROMPTS))


def test_a_step_waits_for_its_own_prompts_and_with_partial_for_enough() -> None:
    ahead, partial = (Pool(make_config(**options), ask) for options in ({"async_steps": 1}, {"partial": True}))
    for pool in (ahead, partial):
        pool.open(1)
        for request in pool.requests():
            if request.seed // 10 not in (0, 2):
                pool.add(respond(request, LIMIT, 0))
    assert not ahead.is_ready(1), "two of its four prompts are not answered"
    assert ahead.answered(1) == 2 * SAMPLES
    assert partial.is_ready(1)
    assert numbers(partial.take(1)) == [1, 3, 4, 5]
    assert under_way(partial) == [0, 2]


def test_a_stopped_response_goes_on_where_it_was() -> None:
    pool = Pool(make_config(partial=True), ask)
    pool.open(1)
    request = next(request for request in pool.requests() if wanted_length(request) >= 6)
    for version, tokens in ((3, 2), (3, 1), (4, LIMIT)):
        (left,) = [each for each in pool.requests() if key_of(each) == key_of(request)]
        pool.add(respond(left, tokens, version))
    assert key_of(request) not in {key_of(each) for each in pool.requests()}
    answer_all(pool)
    (whole,) = [
        group.rollouts[request.sample_index]
        for group in pool.take(1)
        if key_of(request) in {key_of(each) for each in group.requests}
    ]
    expected = respond(request, LIMIT, 4)
    assert (whole.token_ids, whole.logprobs) == (expected.token_ids, expected.logprobs)
    assert whole.finish_reason == "stop"
    assert whole.versions == [(3, 2), (3, 1), (4, wanted_length(request) - 3)]


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("rollout", [{"async_steps": 1}, {"partial": True}, {"async_steps": 2, "partial": True}])
def test_every_prompt_is_trained_on_once_with_whole_responses(rollout: dict, seed: int) -> None:
    draw, pool, taken = random.Random(seed), Pool(make_config(**rollout), ask), []
    for step in range(1, 9):
        pool.open(step)
        while not pool.is_ready(step):
            requests = pool.requests()
            for request in draw.sample(requests, draw.randint(1, len(requests))):
                rest = respond(request, draw.randint(1, 4), step - 1)
                pool.add(rest)
        groups = pool.take(step)
        assert len(groups) == PROMPTS
        taken += numbers(groups)
        for group in groups:
            for request in group.requests:
                assert group.rollouts[request.sample_index].token_ids == respond(request, LIMIT, 0).token_ids
        if not rollout.get("partial"):
            assert numbers(groups) == list(range(PROMPTS * (step - 1), PROMPTS * step))
            rollouts = [rollout for group in groups for rollout in group.rollouts.values()]
            assert staleness_metrics(rollouts, step)["staleness/max"] <= rollout["async_steps"]
    assert len(set(taken)) == len(taken)
    assert set(taken) <= set(range(max(taken) + 1))


def saved(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def half_done() -> Pool:
    pool = Pool(make_config(async_steps=1, partial=True), ask)
    pool.open(1)
    answer_all(pool)
    pool.take(1)
    pool.open(2)
    for request in pool.requests()[::2]:
        pool.add(respond(request, 3, 1))
    return pool


def test_a_restored_pool_goes_on_as_the_saved_one() -> None:
    pool, restored = half_done(), Pool(make_config(async_steps=1, partial=True), ask)
    assert pool.unfinished
    assert restored.restore(saved(pool.state()))
    for each in (pool, restored):
        each.open(2)
    assert restored.requests() == pool.requests()
    for each in (pool, restored):
        answer_all(each, version=1)
    assert restored.take(2) == pool.take(2)


def test_what_was_sampled_with_other_options_is_dropped() -> None:
    state = saved(half_done().state())
    pool = Pool(make_config(async_steps=1, partial=True, temperature=0.5), ask)
    assert not pool.restore(state)
    pool.open(2)
    assert under_way(pool)[0] == PROMPTS, "the second step begins with its own prompts"
    assert not any(request.partial_ids for request in pool.requests())


def test_staleness_is_counted_in_updates_over_tokens() -> None:
    rollout = respond(ask(1).requests[1], LIMIT, 0)
    rollouts = [replace(rollout, versions=[(2, 1), (4, 3)]), replace(rollout, versions=[(4, 4)])]
    assert staleness_metrics(rollouts, step=5) == {"staleness/mean": 2 / 8, "staleness/max": 2.0}
