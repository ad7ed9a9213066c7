"""Evaluation with a fleet that answers from a table: what is asked, how it is scored, and that it can be stopped."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_rl.config import Config
from megatron_rl.evaluate import evaluate_sets, finish_set, publish
from megatron_rl.evaluation.evaluator import Evaluator, load_set
from megatron_rl.evaluation.results import ResultsFile
from megatron_rl.models.scratch import character_tokenizer
from megatron_rl.observability.console import Console
from megatron_rl.rewards.score import Scorer
from rollout.types import Rollout, RolloutRequest

TOKENIZER = character_tokenizer(1024)
Answer = Callable[[RolloutRequest], str]


class TableFleet:
    """Answers every request by a function, the last request first; may end early, as a killed process does."""

    def __init__(self, answer: Answer, breaks_after: int | None = None) -> None:
        self.answer, self.breaks_after = answer, breaks_after
        self.seen: list[RolloutRequest] = []

    def generate(self, requests: list[RolloutRequest]) -> Iterator[Rollout]:
        self.seen += requests
        for number, request in enumerate(reversed(requests)):
            if number == self.breaks_after:
                raise KeyboardInterrupt
            tokens = TOKENIZER(self.answer(request))["input_ids"]
            yield Rollout(
                prompt_id=request.prompt_id,
                sample_index=request.sample_index,
                epoch=request.epoch,
                seed=request.seed,
                prompt_ids=request.prompt_ids,
                token_ids=tokens,
                logprobs=[-1.0] * len(tokens),
                finish_reason="stop",
                policy_version=0,
            )


@pytest.fixture
def config(tmp_path: Path) -> Config:
    def jsonl(name: str, rows: list[dict]) -> str:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    plain = jsonl("plain.jsonl", [{"id": str(i), "prompt": f"{i}+1?", "answer": str(i + 1)} for i in range(40)])
    choices = ["one", "two", "three", "four"]
    stem = jsonl("stem.jsonl", [{"question": f"{i}?", "choices": choices, "answer": i} for i in range(4)])
    return Config.model_validate(
        {
            "model": {"path": "m"},
            "data": {"eval": [plain, f"mmlu_stem={stem}"], "max_prompt_tokens": 300},
            "reward": {"name": "numeric", "length_penalty": {"start": 1}},
            "eval": {"samples": 3},
            "rollout": {"max_tokens": 16},
            "run_dir": str(tmp_path / "results"),
        }
    )


def evaluate(config: Config, fleet: TableFleet, seed: int = 0) -> list[list]:
    """The results of every set, through the files in the run's folder."""
    Path(config.run_dir).mkdir(exist_ok=True)
    console = Console(False)
    sets = [load_set(spec, config, TOKENIZER) for spec in config.data.eval]
    config = config.model_copy(update={"train": config.train.model_copy(update={"seed": seed})})
    with Scorer(config.reward, config.rollout.max_tokens) as scorer:
        evaluator = Evaluator(config, TOKENIZER, fleet, console, sets, scorer)
        return [finish_set(each, evaluator, Path(config.run_dir), console) for each in sets]


def by_seed(request: RolloutRequest) -> str:
    return f"={request.seed % 50}"


def test_every_problem_gets_one_greedy_and_k_sampled_responses(config: Config) -> None:
    fleet = TableFleet(by_seed)
    plain, _ = evaluate(config, fleet)
    asked = [request for request in fleet.seen if request.prompt_id.endswith("plain.jsonl/7")]
    assert [request.temperature for request in asked] == [1.0, 1.0, 1.0, 0.0]
    assert len({request.seed for request in asked}) == 4
    assert [result.problem_id for result in plain] == [str(i) for i in range(40)], "in the order of the set"
    for result in plain:
        for outcome in (result.greedy, *result.samples):
            assert outcome.correct == (outcome.text == f"={result.answer}") and outcome.answer == outcome.text[1:]
    assert [sample.text for sample in plain[7].samples] == [by_seed(request) for request in asked[:3]]


def test_nothing_may_be_left_after_the_last_full_scoring(config: Config) -> None:
    shorter = config.model_copy(update={"eval": config.eval.model_copy(update={"max_prompts": 32})})
    plain, _ = evaluate(shorter, TableFleet(by_seed))  # 128 responses, scored 64 at a time
    assert len(plain) == 32


def test_a_public_set_is_scored_by_its_own_reward(config: Config) -> None:
    plain, stem = evaluate(config, TableFleet(lambda request: r"\boxed{B} 2"))
    assert [result.answer for result in stem] == ["A", "B", "C", "D"]
    assert [result.greedy.correct for result in stem] == [False, True, False, False]
    assert [result.problem_id for result in plain if result.greedy.correct] == ["1"]


def test_a_stopped_evaluation_goes_on_and_gives_the_same_file(config: Config, tmp_path: Path) -> None:
    evaluate(config, TableFleet(by_seed))
    whole = {file.name: file.read_bytes() for file in (tmp_path / "results").glob("*.jsonl")}
    assert len(whole) == 2
    again = config.model_copy(update={"run_dir": str(tmp_path / "again")})
    with pytest.raises(KeyboardInterrupt):
        evaluate(again, TableFleet(by_seed, breaks_after=101))  # of 160; scored 64 at a time
    plain = ResultsFile(tmp_path / "again", config.data.eval[0])
    assert len(plain.read()) == 16
    plain.file.write_bytes(plain.file.read_bytes()[:-5])  # and the last line is not whole
    fleet = TableFleet(by_seed)
    evaluate(again, fleet)
    assert len({request.prompt_id for request in fleet.seen}) == 40 - 15 + 4
    assert {file.name: file.read_bytes() for file in (tmp_path / "again").glob("*.jsonl")} == whole


def test_the_seed_fixes_the_responses_and_another_changes_them(config: Config, tmp_path: Path) -> None:
    def texts(seed: int, folder: str) -> list[str]:
        plain, _ = evaluate(config.model_copy(update={"run_dir": str(tmp_path / folder)}), TableFleet(by_seed), seed)
        return [sample.text for result in plain for sample in result.samples]

    first = texts(0, "a")
    assert texts(0, "b") == first
    assert texts(1, "c") != first


def test_a_problem_that_has_changed_is_generated_again(config: Config, tmp_path: Path) -> None:
    plain, stem = evaluate(config, TableFleet(by_seed))
    file = ResultsFile(tmp_path / "results", config.data.eval[0])
    file.write([dataclasses.replace(plain[0], answer="other"), *plain[1:]])
    fleet = TableFleet(by_seed)
    assert evaluate(config, fleet) == [plain, stem]
    assert {request.prompt_id.rpartition("/")[2] for request in fleet.seen} == {"0"}


def test_the_summary_is_printed_and_written(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path(config.run_dir).mkdir()
    sets = [load_set(spec, config, TOKENIZER) for spec in config.data.eval]
    fleet = TableFleet(lambda request: r"\boxed{B} 2")
    publish(evaluate_sets(config, TOKENIZER, sets, fleet, Console(False)), Path(config.run_dir))
    summary = json.loads((tmp_path / "results" / "summary.json").read_text())
    assert summary["sets"]["mmlu_stem"]["majority@3"]["value"] == 0.25
    assert summary["sets"]["mmlu_stem"]["greedy_accuracy"] | {"value": 0} == {
        "value": 0,
        "low": pytest.approx(0.0456, abs=1e-4),  # Wilson's interval of 1 in 4
        "high": pytest.approx(0.6994, abs=1e-4),
    }
    shown = capsys.readouterr().out
    assert "mmlu_stem" in shown and "25.0%" in shown and "4.6% to 69.9%" in shown
