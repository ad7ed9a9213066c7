"""The fleet: every request is answered exactly once, whatever dies meanwhile."""

import os
import re
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_rl.config import ConfigError
from rollout.engine.engine_arguments import engine_arguments
from rollout.engine.vllm_options import check_vllm_options
from rollout.fleet.fleet import RolloutFleet
from rollout.fleet.weight_client import FleetClient
from rollout.types import RolloutRequest
from rollout.weight_transfer.checksum import differing
from rollout.weight_transfer.connection import connect, segment_name
from tests.rollout.helpers import make_config, make_environment, make_requests, tokens_by_key
from tests.rollout.weight_transfer.test_weight_transfer import StateDictSource, _load


@pytest.fixture(scope="module")
def restarted() -> list[int]:
    return []


@pytest.fixture(scope="module")
def pair(
    fleet: RolloutFleet, model: Path, restarted: list[int], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RolloutFleet]:
    """Two engines that run few requests at a time, so that there is a backlog."""
    config = make_config(tmp_path_factory.mktemp("pair"), model, engines=2, vllm={"max_num_seqs": 8})
    pair = RolloutFleet(config, make_environment(), str(model), on_restart=restarted.append)
    yield pair
    pair.shutdown()


def test_two_engines_answer_every_request_once_and_as_one_engine_would(fleet: RolloutFleet, pair: RolloutFleet) -> None:
    requests = make_requests(20, samples=4)
    rollouts = list(pair.generate(requests))
    assert len(rollouts) == 80
    tokens = {(r.prompt_id, r.sample_index): r.token_ids for r in rollouts}
    assert tokens == tokens_by_key(fleet, requests)
    assert len(set(pair.pids())) == 2


def test_rollouts_carry_their_request_and_the_policy_version(pair: RolloutFleet) -> None:
    pair.set_policy_version(7)
    requests = {(r.prompt_id, r.sample_index): r for r in make_requests(4, samples=2)}
    for rollout in pair.generate(list(requests.values())):
        request = requests[rollout.prompt_id, rollout.sample_index]
        assert (rollout.seed, rollout.epoch, rollout.prompt_ids) == (request.seed, request.epoch, request.prompt_ids)
        assert rollout.policy_version == 7


def test_completions_stream_before_all_are_done(pair: RolloutFleet) -> None:
    short, long = make_requests(1, max_tokens=1), replace(make_requests(2, max_tokens=60)[1], prompt_id="long")
    stream = pair.generate([*short, *(replace(long, sample_index=i, seed=i) for i in range(60))])
    assert next(stream).prompt_id == "p0"
    assert len(list(stream)) == 60


def test_prompts_asked_for_during_a_generation_are_answered_as_from_the_start(
    fleet: RolloutFleet, pair: RolloutFleet
) -> None:
    requests = make_requests(8, samples=4)
    groups = [requests[start : start + 4] for start in range(0, len(requests), 4)]
    expected = tokens_by_key(fleet, requests)
    for generating in (fleet, pair):
        finished, waiting = 0, groups[5:]

        def more(idle: bool) -> list[list[RolloutRequest]]:
            # One group while the first ones run, one when they are done, and one alone at the end.
            due = idle or finished >= 4 * (8 - len(waiting)) - 12  # noqa: B023
            return [waiting.pop(0)] if due and waiting else []  # noqa: B023

        found = {}
        for rollout in generating.generate(requests[:20], more):
            finished += 1
            found[rollout.prompt_id, rollout.sample_index] = rollout.token_ids
        assert found == expected
        assert not waiting


def test_a_killed_engine_is_restarted_and_the_responses_are_the_same(
    fleet: RolloutFleet, pair: RolloutFleet, restarted: list[int]
) -> None:
    requests = make_requests(24, samples=4, max_tokens=60)
    undisturbed = tokens_by_key(fleet, requests)
    pids = pair.pids()
    stream = pair.generate(requests)
    rollouts = [next(stream)]
    os.kill(pids[1], signal.SIGKILL)
    rollouts += stream
    assert len(rollouts) == 96
    assert {(r.prompt_id, r.sample_index): r.token_ids for r in rollouts} == undisturbed
    assert restarted == [1]
    assert pair.pids()[0] == pids[0] and pair.pids()[1] != pids[1]


def test_a_restarted_engine_gets_the_weights_of_the_last_sync(model: Path, other_model: Path, tmp_path: Path) -> None:
    def restore(index: int) -> None:
        sync.resend(FleetClient(fleet, [index]))

    fleet = RolloutFleet(make_config(tmp_path, model), make_environment(), str(model), on_restart=restore)
    source = StateDictSource(_load(other_model))
    sync = connect("shm", rank=0, client=FleetClient(fleet), source=source, barrier=lambda: None,
                   segment=segment_name(str(tmp_path)), workers=1)  # fmt: skip
    try:
        sync.sync()
        requests = make_requests(60, samples=4, max_tokens=60)  # more than one poll can finish
        expected = tokens_by_key(fleet, requests)
        stream = fleet.generate(requests)
        first = next(stream)
        os.kill(fleet.pids()[0], signal.SIGKILL)
        rollouts = [first, *stream]
        assert {(r.prompt_id, r.sample_index): r.token_ids for r in rollouts} == expected
        assert differing(source.checksums(), fleet.checksums()[0]) == []

        os.kill(fleet.pids()[0], signal.SIGKILL)  # an engine that dies between generations is noticed by the sync
        source.weights = _load(model)
        sync.sync()
        assert differing(source.checksums(), fleet.checksums()[0]) == []
    finally:
        sync.shutdown()
        fleet.shutdown()


@pytest.mark.slow
def test_too_many_deaths_end_the_run(model: Path, tmp_path: Path) -> None:
    config = make_config(tmp_path, model, max_restarts=0)
    fleet = RolloutFleet(config, make_environment(), str(model), on_restart=lambda index: None)
    try:
        os.kill(fleet.pids()[0], signal.SIGKILL)
        with pytest.raises(RuntimeError, match=r"died 1 times, more than rollout\.max_restarts=0"):
            list(fleet.generate(make_requests(2)))
    finally:
        fleet.shutdown()


def test_an_engine_that_cannot_start_is_one_clear_error(fleet: RolloutFleet, model: Path, tmp_path: Path) -> None:
    config = make_config(tmp_path, model, vllm={"max_model_len": 100_000})
    with pytest.raises(
        ConfigError, match=r"^vLLM refuses the engine's options \(rollout\.vllm\): .*max_position_embeddings"
    ):
        RolloutFleet(config, make_environment(), str(model), on_restart=lambda index: None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_ids": [5] * 100, "max_tokens": 29}, "100 prompt tokens and may generate 29, but .* 1 to 128"),
        ({"prompt_ids": []}, "0 prompt tokens"),
        ({"prompt_ids": [5, 128]}, "outside the model's vocabulary of 128"),
    ],
)
def test_a_request_that_does_not_fit_is_an_error_and_the_fleet_goes_on(
    fleet: RolloutFleet, change: dict, message: str
) -> None:
    requests = make_requests(3)
    with pytest.raises(ValueError, match=message):
        list(fleet.generate([requests[0], replace(requests[1], **change)]))
    assert len(list(fleet.generate(make_requests(3)))) == 3


def test_repeated_keys_are_refused(fleet: RolloutFleet) -> None:
    with pytest.raises(ValueError, match="same prompt id"):
        next(fleet.generate(make_requests(1) * 2))


def test_tensor_parallel_engines_hold_the_weights_and_generate_the_same(
    fleet: RolloutFleet, model: Path, other_model: Path, tmp_path: Path
) -> None:
    requests = make_requests(8)
    config = make_config(tmp_path, model, tp_size=2)
    split = RolloutFleet(config, make_environment(), str(model), on_restart=lambda index: None)
    try:
        assert tokens_by_key(split, requests) == tokens_by_key(fleet, requests)
        maps = Path(f"/proc/{split.pids()[0]}/maps").read_text()
        segments = set(re.findall(r"/dev/shm/psm_\w+", maps))
        source = StateDictSource(_load(other_model))
        sync = connect("shm", rank=0, client=FleetClient(split), source=source, barrier=lambda: None,
                       segment=segment_name(str(tmp_path)), workers=2)  # fmt: skip
        assert differing(source.checksums(), split.checksums()[0]) != []
        sync.sync()
        assert differing(source.checksums(), split.checksums()[0]) == []
        sync.shutdown()
    finally:
        split.shutdown()
    assert segments and not any(os.path.exists(segment) for segment in segments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"enforce_eagr": True}, r"rollout\.vllm\.enforce_eagr is no option .* did you mean enforce_eager\?"),
        ({"tensor_parallel_size": 2}, r"rollout\.vllm\.tensor_parallel_size cannot be set: set rollout\.tp_size"),
        ({"logprobs_mode": "raw_logits"}, r"rollout\.vllm\.logprobs_mode cannot be set"),
    ],
)
def test_wrong_vllm_options_are_named_before_anything_starts(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_vllm_options(options)


def test_the_users_vllm_options_win_over_the_machines(model: Path, tmp_path: Path) -> None:
    config = make_config(tmp_path, model, vllm={"max_num_seqs": 4, "block_size": 64})
    arguments = engine_arguments(config, make_environment(), str(model))
    assert (arguments["max_num_seqs"], arguments["block_size"], arguments["enforce_eager"]) == (4, 64, True)
    assert arguments["max_model_len"] == 64 + 64
