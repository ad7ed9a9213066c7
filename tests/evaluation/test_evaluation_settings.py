"""From an experiment to an evaluation of it."""

import os
from pathlib import Path

import pytest

from megatron_rl.config import Config, ConfigError
from megatron_rl.evaluation.evaluation_settings import for_evaluation, settings


@pytest.fixture
def config(tmp_path: Path) -> Config:
    for name in ("base", "run/hf", "run/checkpoints/step_000020/megatron"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "base" / "model.safetensors").touch()
    (tmp_path / "run" / "checkpoints" / "step_000020" / "megatron" / "metadata.json").touch()
    return Config.model_validate(
        {
            "model": {"path": str(tmp_path / "base")},
            "data": {"eval": ["gsm8k", "math500"]},
            "train": {"seed": 3},
            "eval": {"samples": 4, "schedule": {"math500": 5}, "best": "math500/avg_at_k"},
            "rollout": {"max_tokens": 16, "history": {"mode": "lenient", "budget": {"measure": "kl", "target": 0.01}}},
            "run_dir": str(tmp_path / "run"),
        }
    )


def test_a_checkpoint_is_evaluated_beside_its_run(config: Config, tmp_path: Path) -> None:
    checkpoint = tmp_path / "run" / "checkpoints" / "step_000020"
    evaluated = for_evaluation(config, checkpoint, ["gsm8k", "own.jsonl"], 7, None)
    assert evaluated.model.path == str(checkpoint)
    assert evaluated.run_dir == str(tmp_path / "run" / "eval" / "step_000020")
    assert (evaluated.data.eval, evaluated.train.seed, evaluated.eval.samples) == (["gsm8k", "own.jsonl"], 7, 4)
    assert evaluated.rollout.history.mode == "off"


def test_without_options_it_is_the_model_of_the_experiment(config: Config, tmp_path: Path) -> None:
    evaluated = for_evaluation(config, None, [], None, None)
    assert evaluated.model == config.model
    assert (evaluated.data.eval, evaluated.train.seed) == (config.data.eval, 3)
    assert evaluated.run_dir == str(tmp_path / "run" / "eval" / "base")


def test_mistakes_are_one_sentence(config: Config, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run/hf holds neither \*\.safetensors nor megatron/metadata\.json"):
        for_evaluation(config, tmp_path / "run" / "hf", [], None, None)
    with pytest.raises(ConfigError, match=r"^data\.eval names 'gsm8k' twice; leave one of them out\.$"):
        for_evaluation(config, None, ["gsm8k", "gsm8k=a.jsonl"], None, None)
    with pytest.raises(ConfigError, match="would write the same file"):
        for_evaluation(config, None, ["a/b.jsonl", "a_b.jsonl"], None, None)
    drafting = {
        "speculation": config.rollout.speculation.model_copy(
            update={"drafters": ["eagle"], "adaptive": "epsilon_greedy"}
        )
    }
    with_head = config.model_copy(update={"rollout": config.rollout.model_copy(update=drafting)})
    with pytest.raises(ConfigError, match=r"no trained head; set drafter\.path"):
        for_evaluation(with_head, None, [], None, None)
    (tmp_path / "run" / "drafter").mkdir()
    assert for_evaluation(with_head, None, [], None, None).drafter.path == str(tmp_path / "run" / "drafter")


def test_settings_tell_other_results_from_the_same_results_faster(config: Config, tmp_path: Path) -> None:
    before = settings(config)
    faster = config.rollout.model_copy(update={"engines": 4, "threads": 2})
    assert settings(config.model_copy(update={"rollout": faster})) == before
    hotter = config.rollout.model_copy(update={"temperature": 0.5})
    assert settings(config.model_copy(update={"rollout": hotter})) != before
    os.utime(tmp_path / "base" / "model.safetensors", (1, 1))
    assert settings(config) != before, "the weights have changed"
