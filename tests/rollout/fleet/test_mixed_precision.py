"""Fleets of several precisions: who generates what, how the longest responses are finished, and sleep."""

import os
import random
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray

from rollout.engine.engine import RolloutEngine
from rollout.fleet.fleet import RolloutFleet
from rollout.fleet.mixed_precision import LongestResponses
from rollout.fleet.requests import continue_from, deal
from rollout.fleet.weight_client import FleetClient
from rollout.types import Past, Rollout, RolloutRequest, TokenSource
from rollout.weight_transfer.connection import segment_name
from tests.capabilities import require_int8
from tests.rollout.helpers import make_config, make_environment, make_requests
from tests.rollout.weight_transfer.test_weight_transfer import StateDictSource, _load, connected

REQUESTS = make_requests(12, samples=4, max_tokens=60)
TAIL_SHARE = 0.75  # of responses that are mostly as long as they may be


def rollout_of(number: int, length: int) -> Rollout:
    tokens = list(range(length))
    return Rollout(
        "p",
        number,
        0,
        number,
        [1],
        tokens,
        [-1.0] * length,
        "stop",
        0,
        [TokenSource.FRESH] * length,
        [("int8", length)],
    )


def lengths(rollouts: list[Rollout]) -> dict[int, int]:
    return {rollout.sample_index: len(rollout.token_ids) for rollout in rollouts}


def run_tail(total: dict[int, int], size: int, order: list[int]) -> tuple[dict[int, int], dict[int, int], int]:
    """Feed responses in this order, cut at the limit; lengths of the complete and of the partial ones."""
    longest, complete = LongestResponses(len(total), size), []
    for number in order:
        limit = longest.limit
        cut = limit is not None and total[number] > limit
        complete += longest.add(rollout_of(number, limit if cut and limit else total[number]), cut)
    more, partial = longest.split()
    return lengths(complete + more), lengths(partial), longest.discarded


@pytest.mark.parametrize("size", [1, 5, 20, 39])
def test_the_tail_does_not_depend_on_the_order_of_completion(size: int) -> None:
    rng = random.Random(size)
    total = {number: rng.randint(1, 60) for number in range(40)}
    cut = sorted(total.values())[-size - 1]
    expected = {number: length for number, length in total.items() if length <= cut}
    for _ in range(50):
        order = rng.sample(sorted(total), len(total))
        complete, partial, _ = run_tail(total, size, order)
        assert complete == expected
        assert partial == dict.fromkeys(total.keys() - expected.keys(), cut)
    in_step = sorted(total, key=total.__getitem__)  # as when all grow together
    assert run_tail(total, size, in_step)[2] == 0, "nothing is sampled twice then"


def test_responses_of_one_length_have_no_tail() -> None:
    complete, partial, _ = run_tail(dict.fromkeys(range(8), 60), 3, list(range(8)))
    assert len(complete) == 8 and not partial


def test_a_response_that_is_surely_no_tail_is_released_at_once() -> None:
    longest = LongestResponses(total=10, size=2)
    assert [len(longest.add(rollout_of(number, 5), truncated=False)) for number in range(4)] == [0, 0, 1, 1]
    assert longest.limit is None


@pytest.mark.parametrize("source", [TokenSource.HISTORY, TokenSource.KEPT, TokenSource.FRESH])
def test_what_is_left_of_an_earlier_response_goes_along(source: TokenSource) -> None:
    past = Past(np.arange(9, dtype=np.int32), -np.arange(9, dtype=np.float32), seed=7)
    request = replace(make_requests(1, samples=1, max_tokens=60)[0], past=past)
    partial = replace(rollout_of(0, 4), sources=[TokenSource.HISTORY] * 3 + [source])
    rest = continue_from(request, partial)
    assert rest.partial_ids == partial.token_ids
    if source is TokenSource.FRESH:
        assert rest.past is None
    else:
        assert rest.past is not None and rest.past.seed == 7
        assert rest.past.token_ids.tolist() == [4, 5, 6, 7, 8] and rest.past.logprobs.tolist() == [-4, -5, -6, -7, -8]


def test_prompts_are_dealt_by_their_place_in_the_list() -> None:
    backlog = deal(make_requests(5, samples=2), ["int8", "none", "int8"])
    dealt = {name: [group[0].prompt_id for group in groups] for name, groups in backlog.items()}
    assert dealt == {"int8": ["p0", "p2", "p3"], "none": ["p1", "p4"]}
    assert all(len(group) == 2 for groups in backlog.values() for group in groups)


@pytest.fixture(scope="module")
def fleets(
    model: Path, other_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[RolloutFleet, RolloutFleet]]:
    """A mixed fleet with `model`, and one with `other_model`."""
    require_int8()
    folder = tmp_path_factory.mktemp("fleets")
    options: dict = {"engines": 2, "quantization": ["none", "int8"], "sleep": 2, "vllm": {"max_num_seqs": 8}}
    first, second = (
        RolloutFleet(make_config(folder, path, **options), make_environment(), str(path), lambda index: None, False)
        for path in (model, other_model)
    )
    for fleet in (first, second):
        fleet.wait_until_up()
    yield first, second
    second.shutdown()
    first.shutdown()


@pytest.fixture
def mixed(fleets: tuple[RolloutFleet, RolloutFleet]) -> RolloutFleet:
    return fleets[0]


def test_a_prompt_asked_for_later_has_the_precision_that_it_would_have_had(mixed: RolloutFleet) -> None:
    groups = [REQUESTS[start : start + 4] for start in range(0, len(REQUESTS), 4)]
    expected = values(list(mixed.generate(REQUESTS)))
    waiting = groups[3:]
    first = [request for group in groups[:3] for request in group]
    rollouts = list(mixed.generate(first, lambda idle: [waiting.pop(0)] if idle and waiting else []))
    found = values(rollouts)
    assert {key: tokens for key, (tokens, _) in found.items()} == {key: tokens for key, (tokens, _) in expected.items()}
    assert not waiting


Values = dict[tuple[str, int], tuple[list[int], list[float]]]


def values(rollouts: list[Rollout]) -> Values:
    return {(r.prompt_id, r.sample_index): (r.token_ids, r.logprobs) for r in rollouts}


def alone(fleet: RolloutFleet, precision: str, requests: list[RolloutRequest] = REQUESTS) -> list[Rollout]:
    """What the fleet's engine of this precision makes of the requests by itself."""
    index = [engine.precision for engine in fleet._engines].index(precision)
    rollouts: list[Rollout] = ray.get(fleet.call(index, "generate_timed", requests)).rollouts
    return rollouts


def test_each_prompt_has_its_precision_whatever_the_timing(mixed: RolloutFleet) -> None:
    whole = {precision: values(alone(mixed, precision)) for precision in ("none", "int8")}
    assert whole["none"] != whole["int8"]
    mixed.take_precision_counts()
    rollouts = list(mixed.generate(REQUESTS))
    assert len(rollouts) == len(REQUESTS)
    for rollout in rollouts:
        precision = ("none", "int8")[int(rollout.prompt_id[1:]) % 2]
        assert rollout.precisions == [(precision, len(rollout.token_ids))]
        key = rollout.prompt_id, rollout.sample_index
        assert rollout.token_ids == whole[precision][key][0]
    seconds = mixed.take_precision_counts().seconds
    assert set(seconds) == {"none", "int8"} and all(0 < value < 60 for value in seconds.values())


@pytest.mark.slow
def test_a_restarted_engine_keeps_its_precision(mixed: RolloutFleet, model: Path, tmp_path: Path) -> None:
    def restore(index: int) -> None:
        sync.resend(FleetClient(mixed, [index]))

    mixed._on_restart = restore
    sync = connected(mixed, StateDictSource(_load(model)), segment_name(str(tmp_path)))
    sync.sync()
    expected = {key: tokens for key, (tokens, _) in values(list(mixed.generate(REQUESTS))).items()}
    os.kill(mixed.pids()[1], signal.SIGKILL)
    rollouts = list(mixed.generate(REQUESTS))
    sync.shutdown()
    assert mixed._engines[1].restarts == 1
    assert {key: tokens for key, (tokens, _) in values(rollouts).items()} == expected
    assert Counter(r.precisions[0][0] for r in rollouts) == {"none": len(REQUESTS) // 2, "int8": len(REQUESTS) // 2}


def test_a_response_that_was_begun_elsewhere_continues_as_if_it_had_not_moved(mixed: RolloutFleet) -> None:
    whole = {(r.prompt_id, r.sample_index): r for r in alone(mixed, "none")}
    requests = [request for request in REQUESTS if len(whole[request.prompt_id, request.sample_index].token_ids) > 7]
    partial = [replace(r, partial_ids=whole[r.prompt_id, r.sample_index].token_ids[:7]) for r in requests]
    for rest in alone(mixed, "none", partial):
        expected = whole[rest.prompt_id, rest.sample_index]
        assert rest.token_ids == expected.token_ids[7:]
        assert rest.logprobs == pytest.approx(expected.logprobs[7:], abs=1e-3)
        assert rest.finish_reason == expected.finish_reason


def test_a_minimum_length_counts_the_partial_response() -> None:
    engine = RolloutEngine({}, sampling={"min_tokens": 8, "top_k": 5})
    assert [engine._sampling_after(tokens) for tokens in (0, 5, 20)] == [
        {"min_tokens": left, "top_k": 5} for left in (8, 3, 0)
    ]


def test_the_longest_responses_are_begun_in_int8_and_finished_without(
    mixed: RolloutFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mixed, "_tail_fraction", TAIL_SHARE)
    partial = {(r.prompt_id, r.sample_index): r for r in alone(mixed, "int8")}
    mixed.take_precision_counts()
    rollouts = list(mixed.generate(REQUESTS))
    size = int(TAIL_SHARE * len(REQUESTS))
    cut = sorted(len(r.token_ids) for r in partial.values())[-size - 1]
    requests = {(request.prompt_id, request.sample_index): request for request in REQUESTS}
    for rollout in rollouts:
        key = rollout.prompt_id, rollout.sample_index
        first = partial[key]
        if len(first.token_ids) <= cut:
            assert (rollout.token_ids, rollout.logprobs) == (first.token_ids, first.logprobs)
            assert rollout.precisions == [("int8", len(first.token_ids))]
            continue
        (rest,) = alone(mixed, "none", [replace(requests[key], partial_ids=first.token_ids[:cut])])
        assert rollout.token_ids == first.token_ids[:cut] + rest.token_ids
        assert rollout.logprobs == pytest.approx(first.logprobs[:cut] + rest.logprobs, abs=1e-4)
        assert rollout.precisions == [("int8", cut), ("none", len(rest.token_ids))]
        assert rollout.finish_reason == rest.finish_reason
        assert len(rollout.token_ids) <= 60
    assert {key: tokens for key, (tokens, _) in values(rollouts).items()} != {
        key: r.token_ids for key, r in partial.items()
    }
    counts = mixed.take_precision_counts()
    assert set(counts.seconds) == {"int8", "none"} and counts.discarded >= 0
    again = {key: tokens for key, (tokens, _) in values(list(mixed.generate(REQUESTS[::-1]))).items()}
    assert again == {key: tokens for key, (tokens, _) in values(rollouts).items()}


@pytest.mark.slow
def test_engines_that_slept_hold_the_new_weights_like_fresh_ones(
    fleets: tuple[RolloutFleet, RolloutFleet], model: Path, other_model: Path, tmp_path: Path
) -> None:
    (mixed, fresh), requests = fleets, make_requests(8)
    before, after = values(list(mixed.generate(requests))), values(list(fresh.generate(requests)))
    assert before != after
    for level in (1, 2):
        mixed._sleep_level = level
        for folder, expected in ((other_model, after), (model, before)):
            mixed.sleep()
            with pytest.raises(RuntimeError, match="the engines sleep"):
                mixed.generate(requests)
            mixed.wake_up()
            source = StateDictSource(_load(folder))
            sync = connected(mixed, source, segment_name(str(tmp_path)))
            sync.sync()
            sync.shutdown()
            mixed.wake_up_fully()
            assert values(list(mixed.generate(requests))) == expected


def test_an_engine_with_requests_does_not_sleep(mixed: RolloutFleet) -> None:
    ray.get(mixed.call(0, "submit", REQUESTS[:1]))
    with pytest.raises(RuntimeError, match="1 requests are still running"):
        ray.get(mixed.call(0, "sleep", 1))
    ray.get(mixed.call(0, "take_unfinished"))
