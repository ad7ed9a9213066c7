"""Responses that were judged by hand, and references of published sets, each of which is its own right answer.

`judged_cases.jsonl` has one case a line: the reward, the kind of difficulty, the reference answer, the response, and
the score that a careful teacher gives. The scores were written down before the code was tried.
"""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.rewards.answers import final_answer
from megatron_rl.rewards.builtin import BUILTIN, JUDGES

HERE = Path(__file__).parent
CASES: list[dict[str, Any]] = [
    json.loads(line) for line in (HERE / "judged_cases.jsonl").read_text(encoding="utf-8").splitlines()
]
KINDS = sorted({(case["reward"], case["kind"]) for case in CASES})
PUBLISHED = [line.split("\t") for line in (HERE / "published_references.tsv").read_text(encoding="utf-8").splitlines()]


def test_the_table_has_many_different_cases_of_both_scores() -> None:
    assert len({(case["reward"], case["response"], case["answer"]) for case in CASES}) == len(CASES) >= 300
    scores = Counter((case["reward"], case["score"]) for case in CASES)
    assert scores.keys() == {(reward, score) for reward in BUILTIN for score in (0, 1)}
    assert min(scores["math", 0], scores["math", 1]) > 150


@pytest.mark.parametrize(("reward", "kind"), KINDS)
def test_responses_get_the_score_that_a_careful_teacher_gives(reward: str, kind: str) -> None:
    cases = [case for case in CASES if (case["reward"], case["kind"]) == (reward, kind)]
    wrong = {
        (case["response"], case["answer"]): case["score"]
        for case in cases
        if BUILTIN[reward]("", case["response"], case["answer"]) != case["score"]
    }
    assert wrong == {}


@pytest.mark.parametrize("reward", sorted(BUILTIN))
def test_equal_votes_are_right_or_wrong_together(reward: str) -> None:
    scores: dict[tuple[str, str | None], set[int]] = {}
    for case in CASES:
        if case["reward"] == reward:
            vote = case["answer"], final_answer(case["response"], reward)
            scores.setdefault(vote, set()).add(case["score"])
    assert {vote for vote, found in scores.items() if len(found) > 1} == set()


@pytest.mark.parametrize("published", sorted({name for name, _ in PUBLISHED}))
def test_references_of_published_sets_equal_themselves(published: str) -> None:
    references = [reference for name, reference in PUBLISHED if name == published]
    boxes = {text: "\\boxed{" + re.sub(r"(?<!\\)\$", "", text) + "}" for text in references}
    judged = {text: JUDGES["math"](f"So {box}.", text) for text, box in boxes.items()}
    assert {text: judgement for text, judgement in judged.items() if judgement.score != 1.0} == {}
