"""The folders of `examples/`: what each module does, that its experiment is valid, and that its command runs."""

import os
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from statistics import fmean, pstdev

import pytest
import torch
from transformers import AutoTokenizer

from examples.algorithm.pass_at_k import PassAtK, pass_at_k_advantages
from examples.data_source.products import heldout, train
from examples.reward.digits import score
from megatron_rl.algorithms import load_algorithm
from megatron_rl.cluster.launcher import check_extensions
from megatron_rl.config import Config, ConfigError, load_config
from megatron_rl.config.algorithm import AlgorithmConfig
from megatron_rl.data import load_prompts
from megatron_rl.data.arithmetic import is_heldout
from megatron_rl.models.scratch import character_tokenizer
from megatron_rl.rewards import ScoreItem, Scorer
from tests.drills import metrics
from tests.launching import ROOT
from tests.rollout.tiny_models import make_model

EXAMPLES = ("algorithm", "reward", "data_source")
COMMAND = "megatron-rl train -c examples/{}/experiment.yaml"


def experiment(name: str, *overrides: str) -> Config:
    return load_config(ROOT / "examples" / name / "experiment.yaml", overrides)


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_example_has_a_readme_with_its_command(name: str) -> None:
    assert COMMAND.format(name) in (ROOT / "examples" / name / "README.md").read_text()


def test_pass_at_k_advantages_are_those_worked_out_by_hand() -> None:
    # 4 responses, 1 right, sets of 2. Of 6 sets 3 have it: m = 1/2, s = 1/2. Right: (1/2) / (1/2) = 1. A wrong response
    # is in 3 sets, of which 2 have no right response: (1/2 - 2/3) / (1/2) = -1/3.
    assert pass_at_k_advantages(4, 1, 2) == pytest.approx((1, -1 / 3))
    # 2 right: of 6 sets 1 fails, m = 5/6, s = sqrt(5)/6. Right: 1 / sqrt(5). Wrong: 1 of its 3 sets fails, 1/6 - 1/3 =
    # -1/6: -1 / sqrt(5).
    assert pass_at_k_advantages(4, 2, 2) == pytest.approx((5**-0.5, -(5**-0.5)))
    # 3 right: every set of 2 has one.
    assert pass_at_k_advantages(4, 3, 2) == pass_at_k_advantages(4, 0, 2) == (0, 0)


def test_pass_at_k_advantages_are_means_over_all_sets() -> None:
    for right, k in ((1, 1), (1, 3), (2, 4), (4, 2), (5, 1)):
        rewards = [1.0] * right + [0.0] * (6 - right)
        sets = {members: max(rewards[i] for i in members) for members in combinations(range(6), k)}
        average, deviation = fmean(sets.values()), pstdev(sets.values())
        normalized = {members: (reward - average) / deviation for members, reward in sets.items()}
        expected = tuple(fmean(value for members, value in normalized.items() if i in members) for i in (0, 5))
        assert pass_at_k_advantages(6, right, k) == pytest.approx(expected)


def test_the_algorithm_gives_every_token_its_response_s_advantage() -> None:
    algorithm = load_algorithm(experiment("algorithm", "algorithm.group_size=4", "algorithm.options.k=2").algorithm)
    assert type(algorithm).__name__ == PassAtK.__name__
    rewards = torch.tensor([0.0, 1.0, -1.0, 0.0, 1.0, 1.0, 0.0, 0.0])
    groups, lengths = torch.tensor([7, 3, 7, 7, 7, 3, 3, 3]), torch.tensor([1, 2, 0, 1, 2, 1, 1, 1])
    a = 5**-0.5
    expected = [-1 / 3, a, a, -1 / 3, 1, 1, a, -a, -a]
    result = algorithm.advantages(rewards, groups, lengths)
    assert result.dtype == torch.float32 and result.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("options", [{}, {"k": 0}, {"k": 9}, {"k": 2.0}, {"k": True}, {"k": 2, "m": 1}])
def test_the_algorithm_says_which_options_it_takes(options: dict) -> None:
    settings = AlgorithmConfig(name="examples.algorithm.pass_at_k:PassAtK", options=options)
    with pytest.raises(ConfigError, match=r"^algorithm\.options=.*a whole number from 1 to algorithm\.group_size=8\.$"):
        load_algorithm(settings)


CASES = [
    ("00874*04,01748*02,03496*01,=03496", "3496", 1.0),
    ("=3496", "3496", 1.0),
    ("=03496\n", "3496", 1.0),
    ("=03497", "3496", -0.5 / 5),  # 5 digits, one differs
    ("=3500", "3496", -0.5 * 3 / 4),
    ("=7", "3496", -0.5),
    ("03496", "3496", -1.0),
    ("=03496,", "3496", -1.0),
    ("", "3496", -1.0),
]


@pytest.mark.parametrize(("response", "answer", "expected"), CASES)
def test_the_reward_of_single_responses(response: str, answer: str, expected: float) -> None:
    assert score("00437*08?", response, answer) == pytest.approx(expected)


def test_the_reward_runs_in_worker_processes() -> None:
    config = experiment("reward")
    items = [ScoreItem("00437*08?", response, answer, len(response), "r") for response, answer, _ in CASES]
    items.append(ScoreItem("00437*08?", "=1", "none", 68, "without a number"))
    with Scorer(config.reward, config.rollout.max_tokens, workers=1) as scorer:
        scores = scorer.score(items)
    assert [each.value for each in scores] == pytest.approx([expected for *_, expected in CASES] + [0.0])
    assert [each.error is None for each in scores] == [True] * len(CASES) + [False]
    assert scores[-1].penalty == pytest.approx(-0.2 * 4 / 8)


def test_the_data_source_gives_prompts_of_both_sets() -> None:
    config, tokenizer = experiment("data_source"), character_tokenizer(1024)
    (heldout_name,) = config.data.eval
    prompts = load_prompts(config.data.train, config.data, tokenizer, "train", heldout=False)
    evaluated = load_prompts(heldout_name, config.data, tokenizer, "test", heldout=True)
    assert (len(prompts), len(evaluated)) == (96, 32)
    assert (prompts[0].prompt_id, prompts[0].text, prompts[0].answer) == ("products/2", "00627*32?", "20064")
    assert not {prompt.prompt_id for prompt in prompts} & {prompt.prompt_id for prompt in evaluated}


def test_the_data_source_keeps_what_the_base_model_has_not_seen_for_evaluation() -> None:
    def products(records) -> set[bool]:
        pairs = (record["prompt"].rstrip("?").split("*") for record in records)
        return {is_heldout(int(number), int(factor).bit_length() - 1) for number, factor in pairs}

    assert (products(train()), products(heldout())) == ({False}, {True})


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("algorithm", "algorithm.options.k=9", r"^algorithm\.options=\{'k': 9\} must be k alone"),
        ("data_source", "data.train=examples.no_such:train", r"^data\.train='examples\.no_such:train': importing"),
        ("data_source", "data.eval=[examples.data_source.products:test]", r"^data\.eval=.* has no function test\.$"),
    ],
)
def test_a_mistake_is_found_before_anything_starts(name: str, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_extensions(experiment(name, override), "train")


def test_commands_look_only_at_what_they_need() -> None:
    check_extensions(experiment("algorithm", "algorithm.options.k=9"), "eval")
    check_extensions(experiment("data_source", "data.train=examples.no_such:train"), "eval")
    check_extensions(experiment("data_source", "data.eval=[examples.no_such:train]"), "sft")


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_the_command_of_the_readme_trains(tmp_path: Path, name: str) -> None:
    """The installed command, from the root of the repository, without `PYTHONPATH`."""
    make_model(tmp_path / "model", seed=3)
    AutoTokenizer.from_pretrained(tmp_path / "model")
    small = (
        "parallel.pp_size=1",
        "train.steps=2",
        "train.prompts_per_step=4",
        "eval.max_prompts=4",
        "rollout.max_tokens=68",
    )
    paths = (f"model.path={tmp_path / 'model'}", f"run_dir={tmp_path / 'run'}")
    command = [str(Path(sys.executable).with_name("megatron-rl")), *COMMAND.format(name).split()[1:], *paths, *small]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    steps = metrics(tmp_path / "run")
    assert sorted(steps) == [0, 1, 2]
    assert steps[2]["reward/errors"] == 0
