"""Earlier responses as drafts, in real engines."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from safetensors.torch import load_file, save_file

from drafter.eagle.head_files import save_head
from rollout.sampling.gumbel_noise import acceptance_uniforms
from rollout.types import HISTORY, SUFFIX, Past, Rollout, RolloutRequest, TokenSource
from tests.rollout.helpers import generate, make_requests, open_arguments, open_engines
from tests.rollout.speculation.test_eagle import random_head

TOKENS = 40
EOS = 1


@pytest.fixture(scope="module")
def nearby_model(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model` after a small update."""
    folder = tmp_path_factory.mktemp("nearby") / "model"
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(5)
    for tensor in weights.values():
        tensor += tensor.std() * 0.005 * torch.randn(tensor.shape, generator=generator)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def engines(model: Path, nearby_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """A plain engine; and after an update a plain one, one with history alone, and ones with other drafts behind it.

    The one with an EAGLE head is short of memory and of tokens per step: prompts and drafts are computed in parts.
    """
    folder = tmp_path_factory.mktemp("engines")
    history = {"mode": "coupled", "max_draft_tokens": 16}
    ngram = {"adaptive": "static", "max_draft_tokens": 4}
    short = {"block_size": 32, "num_gpu_blocks_override": 16, "max_num_batched_tokens": 48}
    head = folder / "head"
    save_head(random_head(model, 0), head)
    arguments = [
        open_arguments(folder, model),
        open_arguments(folder, nearby_model),
        open_arguments(folder, nearby_model, history=history),
        open_arguments(folder, nearby_model, history=history, speculation=ngram),
        open_arguments(
            folder, nearby_model, short, str(head), history=history, speculation=ngram | {"drafters": ["eagle"]}
        ),
    ]
    with open_engines(arguments) as actors:
        yield dict(zip(("before", "plain", "history", "ngram", "eagle"), actors, strict=True))


def requests() -> list[RolloutRequest]:
    return make_requests(6, samples=4, max_tokens=TOKENS, temperature=0.7)


@pytest.fixture(scope="module")
def earlier(engines: dict[str, Any]) -> list[Rollout]:
    return generate(engines["before"], requests())


@pytest.fixture(scope="module")
def expected(engines: dict[str, Any]) -> list[Rollout]:
    """What the updated policy draws with the same seeds."""
    return generate(engines["plain"], requests())


def past_of(rollout: Rollout) -> Past:
    return Past(np.array(rollout.token_ids, np.int32), np.array(rollout.logprobs, np.float32), rollout.seed)


def with_past(earlier: list[Rollout], **changes: Any) -> list[RolloutRequest]:
    return [
        replace(request, past=past_of(rollout), **changes) for request, rollout in zip(requests(), earlier, strict=True)
    ]


def common_prefix(first: list[int], second: list[int]) -> int:
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


def counts(engine: Any) -> Any:
    return ray.get(engine.take_speculation_counts.remote())


@pytest.mark.parametrize("engine", ["history", "ngram", "eagle"])
def test_coupled_reuse_emits_the_tokens_of_plain_decoding(
    engines: dict[str, Any], earlier: list[Rollout], expected: list[Rollout], engine: str
) -> None:
    rollouts = generate(engines[engine], with_past(earlier))
    assert [r.token_ids for r in rollouts] == [r.token_ids for r in expected]
    assert [r.finish_reason for r in rollouts] == [r.finish_reason for r in expected]
    for mine, other, old in zip(rollouts, expected, earlier, strict=True):
        torch.testing.assert_close(torch.tensor(mine.logprobs), torch.tensor(other.logprobs), atol=1e-4, rtol=0)
        kept = common_prefix(mine.token_ids, old.token_ids)
        assert mine.sources[:kept] == [TokenSource.HISTORY] * kept
        assert TokenSource.HISTORY not in mine.sources[kept:]
    changed = sum(r.token_ids != old.token_ids for r, old in zip(rollouts, earlier, strict=True))
    assert 0 < changed < len(rollouts), "the update must change some responses"
    assert counts(engines[engine]).accepted_by[SUFFIX] > 0, "after a difference the old texts are still of use"


def test_the_same_policy_draws_all_of_it_again_in_a_few_steps(engines: dict[str, Any], expected: list[Rollout]) -> None:
    counts(engines["history"])
    rollouts = generate(engines["history"], with_past(expected))
    assert [r.token_ids for r in rollouts] == [r.token_ids for r in expected]
    assert {source for r in rollouts for source in r.sources} == {TokenSource.HISTORY}
    measured = counts(engines["history"])
    assert measured.drafted_by[HISTORY] >= measured.accepted_by[HISTORY] > 0
    assert measured.drafted_by[SUFFIX] == 0
    assert measured.steps < TOKENS / 4
    assert measured.history_seconds > 0


def test_another_seed_only_looks_at_the_past(engines: dict[str, Any], earlier: list[Rollout]) -> None:
    fresh = [replace(request, seed=request.seed + 10**6) for request in requests()]
    expected = generate(engines["plain"], fresh)
    requested = [replace(request, past=past_of(old)) for request, old in zip(fresh, earlier, strict=True)]
    rollouts = generate(engines["history"], requested)
    assert [r.token_ids for r in rollouts] == [r.token_ids for r in expected]
    assert TokenSource.HISTORY not in {source for r in rollouts for source in r.sources}


@pytest.mark.parametrize("engine", ["history", "eagle"])
def test_endless_lenience_keeps_all_and_continues_what_was_cut(
    engines: dict[str, Any], earlier: list[Rollout], engine: str
) -> None:
    cut = [replace(old, token_ids=old.token_ids[:13], logprobs=old.logprobs[:13]) for old in earlier]
    rollouts = generate(engines[engine], with_past(cut, lenience=float("inf")))
    for rollout, old in zip(rollouts, cut, strict=True):
        assert rollout.token_ids[: len(old.token_ids)] == old.token_ids
        assert rollout.sources[: len(old.token_ids)] == [TokenSource.KEPT] * len(old.token_ids)
        assert TokenSource.KEPT not in rollout.sources[len(old.token_ids) :]
        assert len(rollout.token_ids) == TOKENS or rollout.token_ids[-1] == EOS
    whole = generate(engines[engine], with_past(earlier, lenience=float("inf")))
    assert [r.token_ids for r in whole] == [r.token_ids for r in earlier]
    assert [r.finish_reason for r in whole] == [r.finish_reason for r in earlier]
    assert {source for r in whole for source in r.sources} == {TokenSource.KEPT}


def test_a_shorter_limit_cuts_what_is_reused(engines: dict[str, Any], earlier: list[Rollout]) -> None:
    for changes in ({"lenience": float("inf")}, {}):
        for rollout, old in zip(
            generate(engines["history"], with_past(earlier, max_tokens=7, **changes)), earlier, strict=True
        ):
            assert len(rollout.token_ids) == min(len(old.token_ids), 7)
            assert len(rollout.logprobs) == len(rollout.sources) == len(rollout.token_ids)
            assert not changes or rollout.token_ids == old.token_ids[:7]
            assert rollout.finish_reason == ("stop" if rollout.token_ids[-1] == EOS else "length")


def test_lenience_of_minus_infinity_keeps_nothing(
    engines: dict[str, Any], earlier: list[Rollout], expected: list[Rollout]
) -> None:
    rollouts = generate(engines["history"], with_past(earlier, lenience=float("-inf")))
    assert [r.token_ids for r in rollouts] == [r.token_ids for r in expected]
    assert TokenSource.KEPT not in {source for r in rollouts for source in r.sources}


@pytest.mark.parametrize("lenience", [-0.5, 0.0, 0.5])
def test_lenient_reuse_ends_at_the_first_token_that_the_rule_rejects(
    engines: dict[str, Any], earlier: list[Rollout], lenience: float
) -> None:
    """The rule is computed here from the log-probs of both engines; near-ties would show as a difference."""
    requested = with_past(earlier, lenience=lenience)
    kept = generate(engines["history"], with_past(earlier, lenience=float("inf")))
    rollouts = generate(engines["history"], requested)
    rejected_later = 0
    for request, old, now, rollout in zip(requested, earlier, kept, rollouts, strict=True):
        assert now.token_ids == old.token_ids
        positions = torch.arange(len(old.token_ids)) + len(request.prompt_ids) - 1
        log_u = acceptance_uniforms(torch.full((len(positions),), request.seed), positions).log()
        gain = torch.tensor(now.logprobs).double() - torch.tensor(old.logprobs).double()
        accepted = log_u <= lenience + gain
        first = len(accepted) if bool(accepted.all()) else int((~accepted).int().argmax())
        assert rollout.sources.count(TokenSource.KEPT) == first
        assert rollout.sources[:first] == [TokenSource.KEPT] * first
        assert rollout.token_ids[:first] == old.token_ids[:first]
        torch.testing.assert_close(
            torch.tensor(rollout.logprobs[:first]), torch.tensor(now.logprobs[:first]), atol=1e-4, rtol=0
        )
        rejected_later += first < len(accepted) and bool(accepted[first + 1 :].any())
    assert rejected_later > 0 or lenience > 0, "else the first rejection could as well be the last token accepted"


@pytest.mark.slow
def test_tensor_parallel_engines_reuse_as_one_gpu_does(
    engines: dict[str, Any], nearby_model: Path, earlier: list[Rollout], expected: list[Rollout], tmp_path: Path
) -> None:
    history = {"mode": "coupled", "max_draft_tokens": 16}
    with open_engines([open_arguments(tmp_path, nearby_model, history=history, tp_size=2)]) as (split,):
        rollouts = generate(split, with_past(earlier))
        assert [r.token_ids for r in rollouts] == [r.token_ids for r in expected]
        assert counts(split).accepted_by[HISTORY] > 0
        for lenience in (0.0, float("inf")):
            lenient = generate(split, with_past(earlier, lenience=lenience))
            alone = generate(engines["history"], with_past(earlier, lenience=lenience))
            assert [r.token_ids for r in lenient] == [r.token_ids for r in alone]
            assert [r.sources.count(TokenSource.KEPT) for r in lenient] == [
                r.sources.count(TokenSource.KEPT) for r in alone
            ]
