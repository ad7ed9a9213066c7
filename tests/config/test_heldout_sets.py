"""Held-out sets in the config: their names, when they are due, and what does not fit together."""

import pytest

from megatron_rl.config import Config
from megatron_rl.config.heldout_sets import set_name


def config(sets: list[str], data: dict | None = None, steps: int = 50, **evaluation: object) -> Config:
    return Config.model_validate(
        {
            "model": {"path": "m"},
            "data": {"eval": sets} | (data or {}),
            "train": {"steps": steps},
            "eval": evaluation,
            "rollout": {"max_tokens": 16},
            "run_dir": "r",
        }
    )


def test_names_leave_the_file_of_a_public_set_out() -> None:
    assert [set_name(spec) for spec in ("gsm8k", "gsm8k=a=b.jsonl", "a=b.jsonl", "openai/gsm8k:main")] == [
        "gsm8k",
        "gsm8k",
        "a=b.jsonl",
        "openai/gsm8k:main",
    ]


def test_sets_are_due_by_their_own_interval_and_all_at_the_ends() -> None:
    sets = ["gsm8k=x.jsonl", "mmlu_stem", "own.jsonl"]
    settings = config(sets, every=10, schedule={"mmlu_stem": 25, "own.jsonl": 20})
    due = {step: settings.due_sets(step) for step in range(51)}
    assert due[0] == due[50] == sets
    assert {step for step in due if sets[0] in due[step]} == {0, 10, 20, 30, 40, 50}
    assert {step for step in due if sets[1] in due[step]} == {0, 25, 50}
    assert {step for step in due if sets[2] in due[step]} == {0, 20, 40, 50}
    assert config(sets).due_sets(25) == []


@pytest.mark.parametrize(
    ("sets", "data", "evaluation", "message"),
    [
        (["gsm8k", "gsm8k=a.jsonl"], {}, {}, "data.eval names 'gsm8k' twice"),
        (["gsm8k"], {"templates": {"gsm8": "{problem}"}}, {}, "data.templates.gsm8 is for no public set"),
        (["gsm8k"], {"templates": {"gsm8k": "Solve."}}, {}, "has no {problem}"),
        (["gsm8k"], {}, {"schedule": {"math500": 5}}, "eval.schedule.math500 is for no set of data.eval; it has gsm8k"),
        (["gsm8k"], {}, {"best": "gsm8k/accuracy"}, "KIND is one of greedy_accuracy"),
        (["gsm8k"], {}, {"best": "math500/greedy_accuracy"}, "is of no set of data.eval; it has gsm8k"),
        ([], {}, {"best": "greedy_accuracy"}, "it has none"),
        (["gsm8k"], {}, {"best": "avg_at_k"}, "set eval.samples"),
    ],
)
def test_what_does_not_fit_is_named(sets: list[str], data: dict, evaluation: dict, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        config(sets, data, **evaluation)
    assert message in str(caught.value)


@pytest.mark.parametrize("best", ["greedy_accuracy", "gsm8k/pass_at_k", "openai/gsm8k:main/avg_at_k"])
def test_the_best_policy_can_be_chosen_by_a_set_or_by_all(best: str) -> None:
    assert config(["gsm8k", "openai/gsm8k:main"], best=best, samples=2).eval.best == best
