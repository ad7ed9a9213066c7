"""Which requests reuse what, with what noise, and what a step's metrics say of it."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rl.config import Config, ConfigError
from megatron_rl.config.history import LenienceBudgetConfig
from megatron_rl.generation.diversity import final_answer, group_diversity
from megatron_rl.generation.response_reuse import Drift, Lenience, Reuse
from rollout.types import Rollout, RolloutRequest, TokenSource

PROMPTS, SAMPLES, TOKENS = 6, 4, 10


def make_config(tmp_path: Path, **history: Any) -> Config:
    return Config.model_validate(
        {
            "model": {"path": str(tmp_path)},
            "rollout": {"max_tokens": 16, "history": {"mode": "coupled", "refresh": 0.0} | history},
            "run_dir": str(tmp_path / "run"),
        }
    )


def make_requests(epoch: int, samples: int = SAMPLES, prompts: int = PROMPTS) -> list[RolloutRequest]:
    return [
        RolloutRequest(
            prompt_id=f"p{prompt}",
            sample_index=sample,
            epoch=epoch,
            seed=epoch * 1000 + prompt * 10 + sample,
            prompt_ids=[prompt, 1, 2],
            max_tokens=16,
            temperature=1.0,
        )
        for prompt in range(prompts)
        for sample in range(samples)
    ]


def answer(request: RolloutRequest, sources: list[TokenSource] | None = None, logprob: float = -1.0) -> Rollout:
    return Rollout(
        prompt_id=request.prompt_id,
        sample_index=request.sample_index,
        epoch=request.epoch,
        seed=request.seed,
        prompt_ids=request.prompt_ids,
        token_ids=[(request.seed + i) % 50 for i in range(TOKENS)],
        logprobs=[logprob] * TOKENS,
        finish_reason="stop",
        policy_version=request.epoch,
        sources=sources or [TokenSource.FRESH] * TOKENS,
    )


def first_epoch(reuse: Reuse) -> list[RolloutRequest]:
    requests = reuse.attach(make_requests(0))
    reuse.finish_step([answer(request) for request in requests], [0.0] * len(requests))
    return requests


def test_off_changes_nothing(tmp_path: Path) -> None:
    reuse = Reuse(make_config(tmp_path, mode="off"))
    assert first_epoch(reuse) == make_requests(0)
    assert reuse.attach(make_requests(1)) == make_requests(1)
    assert reuse.finish_step([answer(request) for request in make_requests(1)], [0.0] * 24) == {}


def test_the_first_epoch_is_plain_and_the_second_draws_with_the_same_seeds(tmp_path: Path) -> None:
    reuse = Reuse(make_config(tmp_path))
    assert first_epoch(reuse) == make_requests(0)
    asked = reuse.attach(list(reversed(make_requests(1))))  # another order
    for request, before in zip(reversed(asked), make_requests(0), strict=True):
        assert (request.seed, request.epoch, request.lenience) == (before.seed, 1, None)
        assert request.past is not None and request.past.seed == before.seed
        assert request.past.token_ids.tolist() == answer(before).token_ids
    # A third epoch goes on with the seeds of the first.
    reuse.finish_step([answer(request) for request in asked], [0.0] * len(asked))
    assert [request.seed for request in reuse.attach(make_requests(2))] == [r.seed for r in make_requests(0)]


def test_a_larger_group_and_new_prompts_are_generated_plainly(tmp_path: Path) -> None:
    reuse = Reuse(make_config(tmp_path))
    first_epoch(reuse)
    plain = make_requests(1, samples=SAMPLES + 2, prompts=PROMPTS + 1)
    for request, before in zip(reuse.attach(plain), plain, strict=True):
        known = request.sample_index < SAMPLES and request.prompt_id != f"p{PROMPTS}"
        assert (request.past is not None) == known
        assert known or request == before


def test_a_prompt_that_is_visited_twice_in_a_step_does_not_draw_the_same_twice(tmp_path: Path) -> None:
    reuse = Reuse(make_config(tmp_path))
    first_epoch(reuse)
    asked = reuse.attach(make_requests(1) + make_requests(2))
    assert len({request.seed for request in asked}) == len(asked)
    assert all(request.past is not None for request in asked[: len(asked) // 2])


def test_a_share_of_the_samples_is_drawn_anew_whatever_the_order(tmp_path: Path) -> None:
    for mode in ("coupled", "lenient"):
        reuse = Reuse(make_config(tmp_path, mode=mode, refresh=0.25))
        plain = make_requests(0, prompts=200)
        reuse.finish_step([answer(request) for request in reuse.attach(plain)], [0.0] * len(plain))
        again = make_requests(1, prompts=200)
        asked = reuse.attach(again)
        renewed = [r.seed == p.seed and r.lenience is None for r, p in zip(asked, again, strict=True)]
        assert sum(renewed) == pytest.approx(200, abs=40)
        assert all(request.past is not None for request in asked), "the old texts remain a source of drafts"
        backwards = reuse.attach(again[::-1])[::-1]
        assert [(r.seed, r.lenience) for r in asked] == [(r.seed, r.lenience) for r in backwards]
        other_epoch = reuse.attach(make_requests(2, prompts=200))
        assert [r.lenience is None and r.seed >= 2000 for r in other_epoch] != renewed


def test_lenient_requests_have_noise_of_their_own(tmp_path: Path) -> None:
    reuse = Reuse(make_config(tmp_path, mode="lenient", lenience=0.7))
    first_epoch(reuse)
    for request, plain in zip(reuse.attach(make_requests(1)), make_requests(1), strict=True):
        assert (request.seed, request.lenience) == (plain.seed, 0.7)
    nothing = Reuse(make_config(tmp_path, mode="lenient", lenience=-math.inf))
    first_epoch(nothing)
    assert {request.lenience for request in nothing.attach(make_requests(1))} == {None}


def test_tokens_by_their_source_add_up(tmp_path: Path) -> None:
    reuse = Reuse(make_config(tmp_path, mode="lenient"))
    first_epoch(reuse)
    asked = reuse.attach(make_requests(1))
    mixed = [TokenSource.KEPT] * 5 + [TokenSource.FRESH] + [TokenSource.DRAFT] * 2 + [TokenSource.FRESH] * 2
    sources = [[TokenSource.KEPT] * TOKENS if i % 4 == 0 else mixed for i in range(len(asked))]
    metrics = reuse.finish_step(
        [answer(r, s, logprob=-0.9) for r, s in zip(asked, sources, strict=True)], [1.0] * len(asked)
    )
    assert metrics["history/reused_tokens"] == 6 * 10 + 18 * 5
    assert metrics["history/drafted_tokens"] == 18 * 2
    assert metrics["history/generated_tokens"] == 18 * 3
    assert metrics["history/full_reuse_fraction"] == 0.25
    assert metrics["history/prefix_mean"] == 150 / 24
    assert metrics["history/found_fraction"] == 1
    assert metrics["history/kl"] == pytest.approx(math.exp(0.1) - 1.1, rel=1e-4)
    assert metrics["history/ess"] == pytest.approx(1)


def test_a_restored_reuse_goes_on_exactly(tmp_path: Path) -> None:
    config = make_config(tmp_path, mode="lenient", budget={"target": 0.1}, refresh=0.3)
    reuse = Reuse(config)
    first_epoch(reuse)
    asked = reuse.attach(make_requests(1))
    reuse.finish_step([answer(r, [TokenSource.KEPT] * TOKENS, -0.9) for r in asked], [0.0] * len(asked))
    torch.save(reuse.state(), tmp_path / "state.pt")
    restored = Reuse(config)
    assert restored.restore(torch.load(tmp_path / "state.pt", weights_only=True))
    for mine, other in zip(restored.attach(make_requests(2)), reuse.attach(make_requests(2)), strict=True):
        assert (mine.seed, mine.lenience) == (other.seed, other.lenience)
        assert mine.past is not None and other.past is not None
        assert mine.past.token_ids.tolist() == other.past.token_ids.tolist()
    hotter = config.model_copy(update={"rollout": config.rollout.model_copy(update={"temperature": 0.7})})
    other = Reuse(hotter)
    assert not other.restore(reuse.state())
    assert {request.past for request in other.attach(make_requests(2))} == {None}


@pytest.mark.parametrize(("measure", "target"), [("kl", 0.02), ("ess", 0.9)])
def test_the_budget_finds_the_lenience_that_holds_its_target(measure: str, target: float) -> None:
    """A world in which drift grows with lenience, as it does where more is kept."""
    lenience = Lenience(0.5, LenienceBudgetConfig(measure=measure, target=target))
    drift = Drift([])
    for _ in range(60):
        drift.kl, drift.ess = 0.01 * math.exp(lenience.value), 1 - 0.04 * math.exp(2 * lenience.value)
        lenience.observe(100, drift)
    assert (drift.kl if measure == "kl" else drift.ess) == pytest.approx(target, rel=0.02)


def test_the_budget_rises_while_nothing_is_kept_and_stays_within_bounds() -> None:
    lenience = Lenience(-1.0, LenienceBudgetConfig(target=0.1))
    lenience.observe(0, Drift([]))
    assert lenience.value == -1.0 + Lenience.LARGEST_MOVE
    for _ in range(100):
        lenience.observe(0, Drift([]))
    assert lenience.value == Lenience.BOUND
    fixed = Lenience(0.5, None)
    fixed.observe(10, Drift([3.0]))
    assert fixed.value == 0.5


def test_drift_of_known_samples() -> None:
    generator = torch.Generator().manual_seed(0)
    then, now = torch.tensor([0.6, 0.3, 0.1]), torch.tensor([0.3, 0.3, 0.4])
    drawn = torch.multinomial(then, 200_000, replacement=True, generator=generator)
    drift = Drift((now.log() - then.log())[drawn].tolist())
    assert drift.kl == pytest.approx(float((then * (then / now).log()).sum()), rel=0.02)
    assert drift.ess == pytest.approx(1 / float((now**2 / then).sum()), rel=0.02)
    assert (Drift([]).kl, Drift([]).ess) == (0.0, 1.0)


def test_diversity_counts_different_responses_and_answers() -> None:
    requests = make_requests(0, samples=4, prompts=2)
    rollouts = [answer(request) for request in requests]
    rollouts[1] = rollouts[0]
    texts = ["x =1", "x =1", "so 1.0", "3", "", "no", "no ", r"is \boxed{x}"]
    metrics = group_diversity(rollouts, texts, 4)
    assert metrics == {"group/distinct_responses": 7 / 8, "group/distinct_answers": (2 + 3) / 8}
    assert final_answer(r"\boxed{1} and \boxed{ 2}") == r"\boxed{ 2}"


@pytest.mark.parametrize(
    ("rollout", "words"),
    [
        ({"history": {"mode": "coupled"}, "sampler": "rejection"}, ["rollout.history.mode=coupled", "rollout.sampler"]),
        ({"history": {"mode": "coupled", "budget": {}}}, ["rollout.history.budget", "lenient"]),
        ({"history": {"mode": "lenient", "budget": {"measure": "ess", "target": 1.5}}}, ["target=1.5", "below 1"]),
        ({"history": {"mode": "lenient", "lenience": math.inf, "budget": {}}}, ["rollout.history.lenience=inf"]),
        ({"history": {"mode": "lenient", "lenience": math.nan}}, ["rollout.history.lenience"]),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path: Path, rollout: dict, words: list[str]) -> None:
    with pytest.raises((ConfigError, ValueError)) as error:
        Config.model_validate({"model": {"path": str(tmp_path)}, "rollout": rollout, "run_dir": str(tmp_path)})
    assert all(word in str(error.value) for word in words)
