"""The driver's side of a step, with a fleet that answers in any order."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_rl.config import Config
from megatron_rl.data.order import PromptOrder
from megatron_rl.data.prompts import load_prompts
from megatron_rl.generation.generator import Generator
from megatron_rl.generation.prompt_sets import read_sets
from megatron_rl.models.scratch import make_scratch_model
from megatron_rl.models.token_ids import load_tokenizer
from megatron_rl.observability.console import Console
from rollout.fleet.mixed_precision import PrecisionCounts
from rollout.types import Rollout, RolloutRequest, SpeculationCounts, TokenSource


class EchoFleet:
    """Answers `=1` to every request, the last request first; what it is asked besides comes after that."""

    def __init__(self, answer: list[int]) -> None:
        self.answer = answer
        self.seen: list[RolloutRequest] = []
        self.counts: list[SpeculationCounts] = []
        self.precision_counts = PrecisionCounts()
        self.slept = 0

    def generate(
        self, requests: list[RolloutRequest], more: Callable[[bool], list[list[RolloutRequest]]] = lambda idle: []
    ) -> Iterator[Rollout]:
        self.seen = list(requests)
        waiting = requests
        while waiting:
            for request in reversed(waiting):
                yield self.respond(request)
            waiting = [request for group in more(True) or [] for request in group]
            self.seen += waiting

    def respond(self, request: RolloutRequest) -> Rollout:
        return Rollout(
            prompt_id=request.prompt_id,
            sample_index=request.sample_index,
            epoch=request.epoch,
            seed=request.seed,
            prompt_ids=request.prompt_ids,
            token_ids=self.answer,
            logprobs=[-1.0] * len(self.answer),
            finish_reason="stop",
            policy_version=0,
            sources=[TokenSource.FRESH, *[TokenSource.DRAFT] * (len(self.answer) - 1)],
        )

    def take_speculation_counts(self) -> list[SpeculationCounts]:
        return self.counts

    def sleep(self) -> None:
        self.slept += 1

    def take_precision_counts(self) -> PrecisionCounts:
        return self.precision_counts


def raising_reward(prompt: str, response: str, answer: str) -> float:
    raise RuntimeError("broken")


@pytest.fixture
def make(tmp_path: Path):
    def build(
        rollout: dict | None = None, algorithm: dict | None = None, **reward: object
    ) -> tuple[Generator, EchoFleet, Config]:
        config = Config.model_validate(
            {
                "model": {"path": str(tmp_path / "model"), "scratch": {}},
                "data": {"max_prompt_tokens": 32, "arithmetic": {"train_size": 5, "eval_size": 3}},
                "reward": reward or {"name": "numeric"},
                "algorithm": {"group_size": 2} | (algorithm or {}),
                "train": {"prompts_per_step": 4},
                "rollout": {"max_tokens": 16} | (rollout or {}),
                "run_dir": str(tmp_path / "run"),
            }
        )
        if not (tmp_path / "model").exists():
            make_scratch_model(config.model.path, config.model.scratch)
        tokenizer = load_tokenizer(config.model.path)
        fleet = EchoFleet(tokenizer("=1")["input_ids"])
        return Generator(config, tokenizer, read_sets(config, tokenizer), fleet, Console(False)), fleet, config

    return build


def test_rollouts_come_back_in_the_order_of_their_prompts(make):
    generator, fleet, _ = make()
    scored = generator.training_rollouts(1)
    asked = [(request.prompt_id, request.sample_index) for request in fleet.seen]
    assert [(rollout.prompt_id, rollout.sample_index) for rollout in scored.rollouts] == asked
    assert len(set(asked)) == 8
    assert [prompt for prompt, _ in asked[::2]] == [prompt for prompt, _ in asked[1::2]], "groups stay together"


def test_a_step_that_straddles_epochs_may_visit_a_prompt_twice(make):
    generator, fleet, _ = make()
    visits = 0
    for step in range(1, 6):
        scored = generator.training_rollouts(step)
        assert len(scored.rollouts) == len(scored.rewards) == 8
        assert len({request.seed for request in fleet.seen}) == 8, "every response has noise of its own"
        visits += len({request.epoch for request in fleet.seen}) == 2
    assert visits > 0, "5 prompts, 4 per step: some steps straddle"


def test_rewards_match_the_prompts_answers(make):
    generator, fleet, config = make()
    prompts = load_prompts("arithmetic", config.data, load_tokenizer(config.model.path), "train", heldout=False)
    answers = {prompt.prompt_id: prompt.answer for prompt in prompts}
    scored = generator.training_rollouts(1)
    expected = [float(answers[rollout.prompt_id] == "1") for rollout in scored.rollouts]
    assert scored.rewards == expected
    assert scored.metrics["response/length_mean"] == 2


@pytest.mark.slow
def test_a_broken_reward_is_counted(make):
    generator, _, _ = make(function="tests.generation.test_generator:raising_reward")
    scored = generator.training_rollouts(1)
    assert scored.rewards == [0.0] * 8
    assert scored.metrics["reward/errors"] == 8
    generator.close()


def test_evaluation_reports_every_set(make):
    generator, fleet, _ = make()
    metrics = generator.evaluate(0)
    assert all(request.temperature == 0 for request in fleet.seen)
    assert 0 <= metrics["eval/arithmetic-heldout/greedy_accuracy"] <= 1


@pytest.mark.parametrize("level", [0, 1])
def test_engines_sleep_after_the_rollouts_of_a_step_and_not_after_an_evaluation(make, level: int):
    generator, fleet, config = make()
    rollout = config.rollout.model_copy(update={"sleep": level})
    generator._config = config.model_copy(update={"rollout": rollout})
    generator.evaluate(0)
    assert fleet.slept == 0
    metrics = generator.training_rollouts(1).metrics
    assert fleet.slept == level
    assert ("time/sleep" in metrics) == bool(level)


def test_speculation_is_measured_when_the_engines_draft(make):
    generator, fleet, _ = make({"speculation": {"adaptive": "thompson"}})
    metrics = generator.training_rollouts(1).metrics
    assert not any(name.startswith("speculation/") for name in metrics)
    counts = SpeculationCounts(
        steps=4, verifications=8, drafted=10, accepted=4, emitted=12, seconds=2.0, draft_seconds=0.5
    )
    counts.chosen[8, "ngram:2"] = 4
    counts.drafted_by["ngram"], counts.accepted_by["ngram"] = 10, 4
    fleet.counts = [counts]
    metrics = generator.training_rollouts(2).metrics
    measured = {name.removeprefix("speculation/"): v for name, v in metrics.items() if "speculation" in name}
    assert measured == {
        "draft_token_fraction": 0.5,  # one of two tokens
        "tokens_per_verification": 1.5,
        "accepted_fraction": 0.4,
        "drafted/ngram": 10.0,
        "accepted_fraction/ngram": 0.4,
        "draft_time_fraction": 0.25,
        "steps/batch_8/ngram:2": 4.0,
    }


def test_the_second_epoch_takes_the_responses_of_the_first_along(make):
    generator, fleet, _ = make({"history": {"mode": "coupled", "refresh": 0.0}})
    seeds: dict[tuple[str, int], int] = {}
    reused = 0
    for step in range(1, 6):  # 5 prompts, 4 per step
        metrics = generator.training_rollouts(step).metrics
        before = dict(seeds)
        for request in fleet.seen:
            key = request.prompt_id, request.sample_index
            seed = before.pop(key, None)  # a second visit within a step is plain
            assert (request.past is not None) == (seed is not None)
            assert seed in (None, request.seed)
            seeds[key] = request.seed
            reused += seed is not None
    assert reused >= 5 * 8 - 3 * 10
    assert metrics["group/distinct_responses"] == 0.5, "the fleet always says the same, to groups of two"
    assert metrics["history/responses"] == 10


class KnowingFleet(EchoFleet):
    """Answers the first request of some prompts right."""

    def __init__(self, answer: list[int], right: dict[str, list[int]]) -> None:
        super().__init__(answer)
        self.right = right

    def respond(self, request: RolloutRequest) -> Rollout:
        rollout = super().respond(request)
        if request.sample_index or request.prompt_id not in self.right:
            return rollout
        tokens = self.right[request.prompt_id]
        fresh = [TokenSource.FRESH] * len(tokens)
        return replace(rollout, token_ids=tokens, logprobs=[-1.0] * len(tokens), sources=fresh)


@pytest.fixture
def sampling(make):
    """A generator with dynamic sampling, and its fleet, which knows the answers to two of the five prompts."""

    def build(extra: int) -> tuple[Generator, KnowingFleet]:
        generator, fleet, config = make(algorithm={"dynamic_sampling": extra})
        tokenizer = load_tokenizer(config.model.path)
        known = sorted(generator._prompts, key=lambda prompt: prompt.prompt_id)[:2]
        right = {prompt.prompt_id: tokenizer(f"={prompt.answer}")["input_ids"] for prompt in known}
        generator._fleet = knowing = KnowingFleet(fleet.answer, right)
        return generator, knowing

    return build


def test_dynamic_sampling_goes_on_through_the_order_until_the_step_is_full(sampling):
    generator, fleet = sampling(9)
    order = PromptOrder(5, 4, 0)
    position = 0
    for step in range(1, 4):
        scored = generator.training_rollouts(step)
        asked, kept = [], []
        while len(kept) < 4:
            index, epoch = order.visit(position)
            position += 1
            asked.append((generator._prompts[index].prompt_id, epoch))
            kept += [asked[-1]] if asked[-1][0] in fleet.right else []
        assert len(asked) >= 8, "two in five teach something"
        assert [(request.prompt_id, request.epoch) for request in fleet.seen[::2]] == asked
        assert [(rollout.prompt_id, rollout.epoch) for rollout in scored.rollouts[::2]] == kept
        assert scored.rewards == [1.0, 0.0] * 4
        assert scored.metrics["sampling/prompts"] == len(asked)
        assert scored.metrics["sampling/filled_prompts"] == 0
        assert scored.metrics["reward/mean"] == pytest.approx(2 / len(asked)), "over the dropped ones too"
    assert generator.refills == position - 12


def test_dynamic_sampling_resumes_where_it_was(sampling):
    whole, fleet = sampling(9)
    steps = [whole.training_rollouts(1)]
    refills = whole.state()
    assert refills > 0
    steps.append(whole.training_rollouts(2))
    resumed, _ = sampling(9)
    assert resumed.restore(refills)
    assert resumed.training_rollouts(2) == steps[1]
    assert resumed.refills == whole.refills


def test_dynamic_sampling_stops_at_its_limit_and_says_so(sampling):
    generator, fleet = sampling(1)
    fleet.right.clear()
    scored = generator.training_rollouts(1)
    assert len(fleet.seen) == 16, "twice 4 prompts, 2 responses each"
    assert [(rollout.prompt_id, rollout.epoch) for rollout in scored.rollouts] == [
        (request.prompt_id, request.epoch) for request in fleet.seen[:8]
    ]
    assert scored.metrics["sampling/filled_prompts"] == 4
    assert scored.metrics["sampling/dropped_fraction"] == 1


def test_dynamic_sampling_reuses_the_responses_of_dropped_prompts(make):
    generator, fleet, _ = make({"history": {"mode": "coupled", "refresh": 0.0}}, algorithm={"dynamic_sampling": 1})
    metrics = generator.training_rollouts(1).metrics  # nothing is right: 8 visits to 5 prompts
    first = {(request.prompt_id, request.sample_index) for request in fleet.seen if request.past is None}
    assert len(first) == 10
    assert metrics["history/responses"] == 10
    generator.training_rollouts(2)
    # Every prompt is visited twice at most; a second visit within a step is plain.
    assert sum(request.past is not None for request in fleet.seen) == 10


def test_a_step_ahead_has_the_prompts_seeds_and_rewards_that_it_has_without(make):
    (plain, _, _), (ahead, fleet, _) = make(), make({"async_steps": 1})
    assert plain.overlap is None
    for step in range(1, 5):
        expected, scored = plain.training_rollouts(step), ahead.training_rollouts(step)
        assert [(r.prompt_id, r.sample_index, r.epoch, r.seed) for r in scored.rollouts] == [
            (r.prompt_id, r.sample_index, r.epoch, r.seed) for r in expected.rollouts
        ]
        assert scored.rewards == expected.rewards
        assert scored.metrics["reward/mean"] == expected.metrics["reward/mean"]
        ahead.overlap.pause()
    assert {(r.prompt_id, r.epoch) for r in fleet.seen}.isdisjoint({(r.prompt_id, r.epoch) for r in scored.rollouts})
    for generator in (plain, ahead):
        generator.close()


def test_watches_see_the_rollouts_of_training_and_not_those_of_evaluation(make):
    generator, _, _ = make()
    seen: list[Rollout] = []

    def watch(rollouts: Iterator[Rollout], total: int) -> Iterator[Rollout]:
        assert total == 8
        for rollout in rollouts:
            seen.append(rollout)
            yield rollout

    generator.add_watch(watch)
    generator.add_watch(lambda rollouts, total: rollouts)
    generator.evaluate(0)
    assert seen == []
    scored = generator.training_rollouts(1)
    assert sorted(map(id, seen)) == sorted(map(id, scored.rollouts))


def test_checkpoints_carry_what_the_options_need(make):
    plain, _, _ = make()
    assert list(plain.parts()) == ["refills"]
    ahead, _, _ = make({"async_steps": 1})
    assert list(ahead.parts()) == ["refills", "pool"]
    reusing, _, _ = make({"history": {"mode": "coupled"}})
    assert list(reusing.parts()) == ["refills", "history"]
    for generator in (plain, ahead, reusing):
        generator.close()
