"""A generation that is stopped in the middle is continued later, and the responses are what they would have been."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from rollout.fleet.fleet import RolloutFleet
from rollout.fleet.requests import RequestKey, continue_from, join_rollouts, key_of
from rollout.types import Rollout, RolloutRequest, TokenSource
from tests.rollout.helpers import make_config, make_environment, make_requests

pytestmark = pytest.mark.slow

REQUESTS = make_requests(40, samples=4, max_tokens=60)


@pytest.fixture(scope="module", params=["one engine", "two engines that draft"])
def stopped(request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    options: dict = {"vllm": {"max_num_seqs": 8}}
    if request.param != "one engine":
        options |= {"engines": 2, "speculation": {"adaptive": "static", "max_draft_tokens": 4}}
    config = make_config(tmp_path_factory.mktemp("stopped"), model, **options)
    fleet = RolloutFleet(config, make_environment(), str(model), on_restart=lambda index: None)
    yield fleet
    fleet.shutdown()


def in_pieces(fleet: RolloutFleet, requests: list[RolloutRequest], looks: int) -> tuple[dict[RequestKey, Rollout], int]:
    """Generate with a stop, and a new policy version, after every so many looks; returns also how often it stopped."""
    requested = {key_of(request): request for request in requests}
    done: dict[RequestKey, Rollout] = {}
    partial: dict[RequestKey, Rollout] = {}
    version = 0
    while len(done) < len(requested):
        fleet.set_policy_version(version)
        seen = 0

        def more(idle: bool) -> list[list[RolloutRequest]] | None:
            nonlocal seen
            seen += 1
            return None if seen > looks else []

        left = [key for key in requested if key not in done]
        rest = [continue_from(requested[k], partial[k]) if k in partial else requested[k] for k in left]
        for rollout in fleet.generate(rest, more):
            key = key_of(rollout)
            rollout = join_rollouts(partial.pop(key), rollout) if key in partial else rollout
            (partial if rollout.finish_reason == "unfinished" else done)[key] = rollout
        version += 1
    assert not partial
    return done, version


def test_stopping_changes_no_token(fleet: RolloutFleet, stopped: RolloutFleet) -> None:
    whole = {key_of(rollout): rollout for rollout in fleet.generate(REQUESTS)}
    pieces, versions = in_pieces(stopped, REQUESTS, looks=1)
    assert versions > 2, "it was stopped more than once"
    several = 0
    for key, rollout in pieces.items():
        expected = whole[key]
        assert (rollout.token_ids, rollout.finish_reason) == (expected.token_ids, expected.finish_reason)
        assert rollout.logprobs == pytest.approx(expected.logprobs, abs=1e-4)
        assert len(rollout.sources) == sum(count for _, count in rollout.versions) == len(rollout.token_ids)
        assert [version for version, _ in rollout.versions] == sorted({version for version, _ in rollout.versions})
        several += len(rollout.versions) > 1
    assert several > 0, "some response was stopped in the middle"
    if len(stopped.pids()) == 2:
        assert any(TokenSource.DRAFT in rollout.sources for rollout in pieces.values())


def test_a_stopped_fleet_is_idle(stopped: RolloutFleet) -> None:
    assert list(stopped.generate(REQUESTS, lambda idle: None)) == []
    looked = []

    def more(idle: bool) -> list[list[RolloutRequest]] | None:
        looked.append(idle)
        return None if len(looked) > 1 else []

    stopped.set_policy_version(7)
    assert all(rollout.versions == [(7, len(rollout.token_ids))] for rollout in stopped.generate(REQUESTS, more))
    short = make_requests(2, max_tokens=3)
    assert len(list(stopped.generate(short))) == 2
