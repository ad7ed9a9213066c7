"""When the policy of a step is the best so far."""

import json
from pathlib import Path

import pytest

from megatron_rl.config import Config, ConfigError
from megatron_rl.trainer.best import best_folder, improvement


def config(run_dir: Path, best: str) -> Config:
    return Config.model_validate(
        {
            "model": {"path": "m"},
            "data": {"eval": ["gsm8k", "math500=m.jsonl"]},
            "eval": {"best": best, "samples": 2},
            "rollout": {"max_tokens": 16},
            "run_dir": str(run_dir),
        }
    )


def keep(settings: Config, value: float) -> None:
    folder = best_folder(settings) / "driver"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "best.json").write_text(json.dumps({"metric": settings.eval.best, "value": value, "step": 1}))


def test_only_a_higher_value_is_better(tmp_path: Path) -> None:
    settings = config(tmp_path, "math500/avg_at_k")
    assert improvement(settings, 3, {"eval/math500/avg_at_k": 0.4}) == 0.4
    keep(settings, 0.4)
    assert improvement(settings, 4, {"eval/math500/avg_at_k": 0.4}) is None
    assert improvement(settings, 4, {"eval/math500/avg_at_k": 0.5, "eval/gsm8k/avg_at_k": 0.1}) == 0.5
    assert improvement(settings, 4, {"eval/gsm8k/avg_at_k": 0.9}) is None, "the set was not evaluated"


def test_the_mean_needs_all_sets(tmp_path: Path) -> None:
    settings = config(tmp_path, "greedy_accuracy")
    both = {"eval/gsm8k/greedy_accuracy": 0.25, "eval/math500/greedy_accuracy": 0.75}
    assert improvement(settings, 3, both) == 0.5
    assert improvement(settings, 3, {"eval/gsm8k/greedy_accuracy": 1.0}) is None


def test_a_new_run_or_metric_begins_anew(tmp_path: Path) -> None:
    settings = config(tmp_path, "gsm8k/greedy_accuracy")
    keep(settings, 0.9)
    metrics = {"eval/gsm8k/greedy_accuracy": 0.1, "eval/gsm8k/pass_at_k": 0.1}
    assert improvement(settings, 0, metrics) == 0.1
    assert improvement(settings, 5, metrics) is None
    assert improvement(config(tmp_path, "gsm8k/pass_at_k"), 5, metrics) == 0.1


def test_a_broken_record_is_one_sentence(tmp_path: Path) -> None:
    settings = config(tmp_path, "gsm8k/greedy_accuracy")
    keep(settings, 0.9)
    (best_folder(settings) / "driver" / "best.json").write_text("{")
    with pytest.raises(ConfigError, match=r"best\.json cannot be read"):
        improvement(settings, 5, {"eval/gsm8k/greedy_accuracy": 1.0})
