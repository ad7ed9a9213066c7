"""Generation beside training, with a fleet that needs time."""

import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from megatron_rl.generation.async_generation import AsyncGeneration
from megatron_rl.generation.prompt_pool import Pool
from megatron_rl.observability.console import Console
from megatron_rl.trainer.weight_sync import WeightSync
from rollout.types import Rollout, RolloutRequest
from tests.generation.test_prompt_pool import PROMPTS, SAMPLES, ask, make_config, numbers, respond


class SlowFleet:
    """A token of every running response in each round, until it may go on no more."""

    def __init__(self) -> None:
        self.version = 0
        self.failure: Exception | None = None
        self.threads: set[int] = set()
        self.rounds = 0
        self.idle = threading.Event()
        self.held: Callable[[RolloutRequest], bool] = lambda request: False
        """Requests that never finish."""

    def new_weights(self, version: int) -> None:
        self.version = version
        self.idle.clear()

    def generate(self, requests: list[RolloutRequest], more: Callable[[bool], list | None]) -> Iterator[Rollout]:
        self.threads.add(threading.get_ident())
        running = dict.fromkeys(map(_Hashed, requests), 0)
        while (further := more(not running)) is not None and (running or further):
            if self.failure is not None:
                raise self.failure
            self.rounds += 1
            time.sleep(0.002)
            for hashed in list(running):
                running[hashed] += 1
                rollout = respond(hashed.request, running[hashed], self.version)
                if rollout.finish_reason == "stop" and not self.held(hashed.request):
                    del running[hashed]
                    yield rollout
        self.idle.set()
        for hashed, tokens in running.items():
            if tokens and (rest := respond(hashed.request, tokens, self.version)).token_ids:
                yield replace(rest, finish_reason="unfinished")


class _Hashed:
    def __init__(self, request: RolloutRequest) -> None:
        self.request = request


@pytest.fixture
def make() -> Iterator[Callable[..., tuple[AsyncGeneration, SlowFleet]]]:
    made: list[AsyncGeneration] = []

    def build(**rollout: object) -> tuple[AsyncGeneration, SlowFleet]:
        config, fleet = make_config(**rollout), SlowFleet()
        made.append(AsyncGeneration(config, Pool(config, ask), fleet, Console(False)))  # type: ignore[arg-type]
        return made[-1], fleet

    yield build
    for overlap in made:
        overlap.close()


def rollouts_of(groups: list) -> list[Rollout]:
    return [group.rollouts[request.sample_index] for group in groups for request in group.requests]


def test_the_next_steps_prompts_are_generated_while_the_trainer_works(make) -> None:
    overlap, fleet = make(async_steps=1)
    for step in range(1, 9):
        groups, metrics = overlap.take(step)
        assert numbers(groups) == list(range(PROMPTS * (step - 1), PROMPTS * step))
        for rollout, request in zip(rollouts_of(groups), [r for g in groups for r in g.requests], strict=True):
            assert rollout.token_ids == respond(request, 100, 0).token_ids
        assert metrics["staleness/max"] <= 1
        assert metrics["staleness/mean"] == (0 if step == 1 else 1)
        assert fleet.idle.wait(10)  # training takes long enough
        if step < 8:
            assert overlap.pool.is_ready(step + 1)
        overlap.pause()
        fleet.new_weights(step)
    assert threading.get_ident() not in fleet.threads


def test_engines_that_may_not_go_further_ahead_wait_for_the_trainer(make) -> None:
    overlap, fleet = make(async_steps=1)
    start = time.perf_counter()
    overlap.take(1)
    assert fleet.idle.wait(10)
    time.sleep(0.05)
    overlap.pause()
    _, metrics = overlap.take(2)
    assert 0.05 <= metrics["overlap/engines_waited_s"] < time.perf_counter() - start
    assert metrics["throughput/generated_tokens_per_s"] > 0


def test_without_new_rollouts_there_is_no_speed(make) -> None:
    overlap, _ = make(async_steps=1)
    assert math.isnan(overlap._metrics([], 1)["throughput/generated_tokens_per_s"])


def test_new_weights_come_in_the_middle_of_responses(make) -> None:
    overlap, fleet = make(async_steps=1)
    mixed = 0
    for step in range(1, 9):
        groups, _ = overlap.take(step)
        for rollout in rollouts_of(groups):
            assert sum(count for _, count in rollout.versions) == len(rollout.token_ids)
            versions = [version for version, _ in rollout.versions]
            assert versions == sorted(versions) and versions[0] >= step - 2 and versions[-1] <= step - 1
            mixed += len(set(versions)) > 1
        rounds = fleet.rounds
        while fleet.rounds < rounds + 2 and not fleet.idle.is_set():
            time.sleep(0.001)
        overlap.pause()
        fleet.new_weights(step)
    assert mixed > 0


def test_partial_steps_do_not_wait_for_stragglers_and_lose_nothing_of_them(make) -> None:
    overlap, fleet = make(partial=True)
    fleet.held = lambda request: request.seed // 10 == 1
    groups, metrics = overlap.take(1)
    assert 1 not in numbers(groups) and len(groups) == PROMPTS
    assert metrics["partial/unfinished"] >= SAMPLES
    rounds = fleet.rounds
    time.sleep(0.02)
    assert fleet.rounds == rounds, "without async_steps the engines are stopped"
    begun = {key: rollout.token_ids for key, rollout in overlap.pool.unfinished.items()}
    fleet.held, fleet.version = lambda request: False, 1
    groups, metrics = overlap.take(2)
    assert 1 in numbers(groups)
    assert metrics["staleness/max"] == 1
    for rollout in rollouts_of(groups):
        beginning = begun.get((rollout.prompt_id, rollout.sample_index, rollout.epoch), [])
        assert rollout.token_ids[: len(beginning)] == beginning
        request = next(r for g in groups for r in g.requests if r.seed == rollout.seed)
        assert rollout.token_ids == respond(request, 100, 0).token_ids


def test_what_goes_wrong_in_the_thread_ends_the_run(make) -> None:
    overlap, fleet = make(async_steps=1)
    fleet.failure = RuntimeError("engine 0 died too often")
    with pytest.raises(RuntimeError, match="died too often"):
        overlap.take(1)
    overlap, fleet = make(async_steps=1)
    overlap.take(1)
    fleet.failure = RuntimeError("engine 1 died too often")
    with pytest.raises(RuntimeError, match="engine 1"):
        time.sleep(0.05)
        overlap.pause()
        overlap.take(2)


def test_an_engine_that_needs_all_ranks_is_not_restored_while_they_train() -> None:
    sync = WeightSync.__new__(WeightSync)
    sync._config, sync._backend, sync._fleet = make_config(async_steps=1), "nccl", object()  # type: ignore[assignment]
    with ThreadPoolExecutor(1) as thread, pytest.raises(RuntimeError, match="engine 3 died while the trainer works"):
        thread.submit(sync.restore, 3).result()
