"""A trained head as a drafter of real engines: its drafts never change a token, and new weights reach it alone."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from transformers import AutoModelForCausalLM

from drafter.eagle.draft_loss import LossOptions
from drafter.eagle.head import EagleHead, HeadConfig
from drafter.eagle.head_files import head_tensors, save_head
from megatron_rl.config import ConfigError
from rollout.engine.engine_arguments import engine_arguments
from rollout.fleet.fleet import RolloutFleet
from rollout.fleet.weight_client import FleetClient
from rollout.speculation.arms import PLAIN
from rollout.speculation.eagle import LINGER
from rollout.speculation.head_weights import pack_head
from rollout.types import Rollout, RolloutRequest, SpeculationCounts
from rollout.weight_transfer.checksum import differing
from rollout.weight_transfer.connection import WeightConnection, segment_name
from tests.drafter.policies import model_features, model_weights, pack, train
from tests.rollout.helpers import generate, make_config, make_environment, open_arguments, open_engines
from tests.rollout.speculation.test_speculation import assert_same, group_requests
from tests.rollout.weight_transfer.test_weight_transfer import StateDictSource, _load, connected

K = 4
BOTH = {"drafters": ["eagle", "ngram"], "max_draft_tokens": K}


def random_head(model: Path, seed: int) -> EagleHead:
    torch.manual_seed(seed)
    config = HeadConfig.for_policy(json.loads((model / "config.json").read_text()))
    return EagleHead(config)


@pytest.fixture(scope="module")
def engines(other_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """A plain engine, and one with a random head that is short of memory and computes prompts in parts."""
    folder = tmp_path_factory.mktemp("engines")
    save_head(random_head(other_model, 0), folder / "head")
    short = {"block_size": 32, "num_gpu_blocks_override": 16, "max_num_batched_tokens": 48}
    config = {"speculation": {"adaptive": "static", **BOTH}}
    plain = open_arguments(folder, other_model)
    eagle = open_arguments(folder, other_model, short, drafter_path=str(folder / "head"), **config)
    with open_engines([plain, eagle]) as actors:
        yield dict(zip(("plain", "eagle"), actors, strict=True))


@pytest.fixture(scope="module")
def expected(engines: dict[str, Any]) -> list[Rollout]:
    return generate(engines["plain"], group_requests())


@pytest.fixture(scope="module")
def trained(other_model: Path, expected: list[Rollout]) -> EagleHead:
    """A head that has learned these very responses by heart, more or less."""
    model = AutoModelForCausalLM.from_pretrained(other_model, dtype=torch.float32)
    head = random_head(other_model, 1)
    features = [
        model_features(model, rollout.prompt_ids + rollout.token_ids, len(rollout.prompt_ids), head.config)
        for rollout in expected[:32]
    ]
    rows = [pack(features[start : start + 8]) for start in range(0, 32, 8)]
    train(head, lambda step: rows[step % 4], model_weights(model), 100, LossOptions(steps=3))
    return head


@pytest.fixture(scope="module")
def pushed(other_model: Path) -> tuple:
    """Arguments of `update_drafter` for another random head."""
    return pack_head(head_tensors(random_head(other_model, 2)), torch.float32), 3


def test_switching_drafters_and_heads_in_mid_run_does_not_change_the_tokens(
    engines: dict[str, Any], expected: list[Rollout], pushed: tuple
) -> None:
    def generate_switching(
        engine: Any, requests: list[RolloutRequest], new_head: tuple
    ) -> tuple[list[Rollout], dict[str, int], SpeculationCounts]:
        scheduler = engine._scheduler
        happened = {"preempted": 0, "caught up": 0}
        preempt, reset = scheduler._preempt_request, scheduler.reset_prefix_cache

        def counting_preempt(*args: Any, **kwargs: Any) -> None:
            happened["preempted"] += 1
            preempt(*args, **kwargs)

        def counting_reset(*args: Any, **kwargs: Any) -> bool:
            happened["caught up"] += bool(kwargs and scheduler.running)
            return reset(*args, **kwargs)  # type: ignore[no-any-return]

        scheduler._preempt_request, scheduler.reset_prefix_cache = counting_preempt, counting_reset
        engine.take_speculation_counts()
        engine.submit(requests)
        rollouts: list[Rollout] = []
        step = 0
        while engine._running:
            if step % (2 * LINGER) == 0:
                rule = [("eagle", 4), ("ngram", 3), ("eagle", 1), ("eagle", 3)][step // (2 * LINGER) % 4]
                engine.set_speculation("static", rule[1], [rule[0]])
                for request in scheduler.requests.values():  # the new n-gram drafter starts from the middle
                    scheduler._ngram.start(request, "again", list(request.all_token_ids))
            if step % (4 * LINGER) == 11:
                scheduler.controller._arm = PLAIN
            if step == 30:
                engine.update_drafter(*new_head)
            step += 1
            rollouts += [engine._rollout(output) for output in engine._step() if output.finished]
        scheduler._preempt_request, scheduler.reset_prefix_cache = preempt, reset
        return rollouts, happened, engine.take_speculation_counts()

    requests = group_requests()
    before = ray.get(engines["eagle"].checksums.remote())
    rollouts, happened, counts = ray.get(engines["eagle"].apply.remote(generate_switching, requests, pushed))
    by_key = {(r.prompt_id, r.sample_index): r for r in rollouts}
    assert_same([by_key[r.prompt_id, r.sample_index] for r in requests], expected)
    assert happened["preempted"] > 0 and happened["caught up"] > 0
    assert counts.drafted_by["eagle"] > 200 and counts.drafted_by["ngram"] > 100
    assert counts.accepted_by["eagle"] == counts.accepted_at.total() > 0
    assert counts.accepted_by.total() == counts.accepted and counts.drafted_by.total() == counts.drafted
    assert 0 < counts.tried_at[1] <= counts.accepted_at[0] < counts.tried_at[0]
    assert counts.drafter_version == 3
    assert ray.get(engines["eagle"].checksums.remote()) == before


@pytest.mark.parametrize("rule", ["static", "epsilon_greedy", "thompson"])
def test_every_rule_emits_the_same_tokens(engines: dict[str, Any], expected: list[Rollout], rule: str) -> None:
    ray.get(engines["eagle"].set_speculation.remote(rule, K))
    assert_same(generate(engines["eagle"], group_requests()), expected)


def test_an_abort_in_the_middle_leaves_the_next_requests_alone(
    engines: dict[str, Any], expected: list[Rollout]
) -> None:
    def abort_half_way(engine: Any, requests: list[RolloutRequest]) -> None:
        engine.set_speculation("static", K, ["eagle"])
        engine.submit(requests)
        for _ in range(6):
            engine._step()
        engine.take_unfinished()

    ray.get(engines["eagle"].apply.remote(abort_half_way, group_requests()))
    assert_same(generate(engines["eagle"], group_requests(64)), expected[:64])


def test_wrong_drafts_are_soon_given_up_and_the_head_rests(engines: dict[str, Any], expected: list[Rollout]) -> None:
    def generate_with_wrong_drafts(
        engine: Any, requests: list[RolloutRequest]
    ) -> tuple[list[Rollout], list[str], list[int]]:
        scheduler, proposer = engine._scheduler, engine._llm.model_executor.driver_worker.worker.model_runner.drafter
        offer, propose, proposals = scheduler.update_draft_token_ids, proposer.propose, []

        def wrong(drafts: Any) -> None:
            drafts.draft_token_ids = [[0] * len(draft) for draft in drafts.draft_token_ids]  # the padding token
            offer(drafts)

        def counting_propose(*args: Any, **kwargs: Any) -> Any:
            proposals.append(len(arms))
            return propose(*args, **kwargs)

        arms: list[str] = []
        rollouts: list[Rollout] = []
        scheduler.update_draft_token_ids, proposer.propose = wrong, counting_propose
        engine.set_speculation("thompson", 3, ["eagle"])
        engine.submit(requests)
        while engine._running:
            rollouts += [engine._rollout(output) for output in engine._step() if output.finished]
            arms.append(str(scheduler.timeline[-1][2]) if scheduler.timeline else "")
        scheduler.update_draft_token_ids, proposer.propose = offer, propose
        return rollouts, arms, proposals

    requests = group_requests()
    rollouts, arms, proposals = ray.get(engines["eagle"].apply.remote(generate_with_wrong_drafts, requests))
    by_key = {(r.prompt_id, r.sample_index): r for r in rollouts}
    assert_same([by_key[r.prompt_id, r.sample_index] for r in requests], expected)
    drafting = [step for step, arm in enumerate(arms) if arm.startswith("eagle")]
    # On a busy machine a slow plain step may let drafts look worth another trial.
    assert len(arms) > 300 and 0 < len(drafting) < len(arms) / 3
    assert len(proposals) < 2 / 3 * len(arms), "the rest of the time the head does not run"


@pytest.mark.slow
def test_a_head_is_pushed_to_it_alone_and_to_restarted_engines(
    other_model: Path, trained: EagleHead, expected: list[Rollout], tmp_path: Path
) -> None:
    save_head(trained, tmp_path / "head")
    config = make_config(
        tmp_path,
        other_model,
        speculation={"adaptive": "static", **BOTH},
        vllm={"load_format": "dummy"},  # as in training: the policy's weights come from the trainer
    )
    weights: list[WeightConnection] = []
    fleet = RolloutFleet(
        config,
        make_environment(),
        str(other_model),
        on_restart=lambda index: weights[0].resend(FleetClient(fleet, [index])) and None,
        drafter_path=str(tmp_path / "head"),
    )
    source = StateDictSource(_load(other_model))
    weights.append(connected(fleet, source, segment_name(str(tmp_path))))

    def tokens_per_verification(version: int) -> float:
        requests = group_requests(32)
        by_key = {(r.prompt_id, r.sample_index): r for r in fleet.generate(requests)}
        assert_same([by_key[r.prompt_id, r.sample_index] for r in requests], expected[:32])
        (counts,) = fleet.take_speculation_counts()
        assert counts.drafter_version == version
        return 1 + counts.accepted_at.total() / counts.tried_at[0]

    try:
        weights[0].sync()
        assert tokens_per_verification(0) > 1.5, "the head of the folder, over the weights that were sent"
        fleet.update_drafter(head_tensors(random_head(other_model, 4)), version=1)
        assert differing(source.checksums(), fleet.checksums()[0]) == []
        assert tokens_per_verification(1) < 1.4
        weights[0].sync()
        fleet.update_drafter(head_tensors(trained), version=2)
        assert differing(source.checksums(), fleet.checksums()[0]) == []
        assert tokens_per_verification(2) > 1.5
        os.kill(fleet.pids()[0], signal.SIGKILL)
        assert tokens_per_verification(2) > 1.5, "a restarted engine gets the last head"
        short = {name: t for name, t in head_tensors(trained).items() if name != "fc.weight"}
        with pytest.raises(ValueError, match=r"fc\.weight: missing"):
            fleet.update_drafter(short, version=3)
    finally:
        fleet.shutdown()
        weights[0].shutdown()


@pytest.mark.slow
def test_two_tensor_parallel_parts_draft_with_a_pushed_head(
    other_model: Path, expected: list[Rollout], pushed: tuple, tmp_path: Path
) -> None:
    save_head(random_head(other_model, 0), tmp_path / "head")
    speculation = {"adaptive": "static", **BOTH}
    path = str(tmp_path / "head")
    arguments = open_arguments(tmp_path, other_model, drafter_path=path, tp_size=2, speculation=speculation)
    with open_engines([arguments]) as (engine,):
        assert_same(generate(engine, group_requests()), expected)
        ray.get(engine.update_drafter.remote(*pushed))
        assert_same(generate(engine, group_requests()), expected)
        counts = ray.get(engine.take_speculation_counts.remote())
        assert counts.drafter_version == 3 and counts.accepted_by["eagle"] > 0


def test_an_output_layer_equal_to_the_policys_stays_the_heads_own(engines: dict[str, Any]) -> None:
    def sharing(engine: Any) -> tuple[bool, bool]:
        from rollout.engine.vllm_patches import SpecDecodeBaseProposer

        runner = engine._llm.model_executor.driver_worker.worker.model_runner
        head, policy = runner.get_draft_model(), runner.get_model()
        own, weight = head.lm_head, head.lm_head.weight
        own.weight = policy.lm_head.weight  # what vLLM compares
        SpecDecodeBaseProposer._maybe_share_lm_head(runner.drafter, policy)
        own.weight = weight
        return head.model.embed_tokens is policy.model.embed_tokens, head.lm_head is own

    assert ray.get(engines["eagle"].apply.remote(sharing)) == (True, True)


def test_a_missing_or_other_head_is_named(other_model: Path, tmp_path: Path) -> None:
    config = make_config(tmp_path, other_model, speculation={"adaptive": "thompson", **BOTH})
    with pytest.raises(ConfigError, match=r"set drafter\.path"):
        engine_arguments(config, make_environment(), str(other_model))
    with pytest.raises(ConfigError, match=r"nothing holds no EAGLE head"):
        engine_arguments(config, make_environment(), str(other_model), str(tmp_path / "nothing"))
    head = EagleHead(HeadConfig.for_policy(json.loads((other_model / "config.json").read_text()), "eagle"))
    save_head(head, tmp_path / "head")
    with pytest.raises(ConfigError, match=r"an eagle head, but drafter\.kind=eagle3"):
        engine_arguments(config, make_environment(), str(other_model), str(tmp_path / "head"))
    named = config.model_copy(update={"drafter": config.drafter.model_copy(update={"kind": "eagle"})})
    arguments = engine_arguments(named, make_environment(), str(other_model), str(tmp_path / "head"))
    assert arguments["speculative_config"]["method"] == "eagle"
