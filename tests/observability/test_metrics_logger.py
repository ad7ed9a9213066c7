"""metrics.jsonl survives crashes and resumes; wandb offline really writes a run."""

import json
import math
from pathlib import Path

import pytest

from megatron_rl.config import Config, ConfigError
from megatron_rl.observability.metrics_logger import METRICS_FILE, MetricsLogger, read_metrics


def config(run_dir: Path, **wandb: str) -> Config:
    return Config.model_validate({"model": {"path": "m"}, "run_dir": str(run_dir), "track": {"wandb": wandb}})


def lines(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / METRICS_FILE).read_text().splitlines()]


def test_a_logged_step_is_on_disk_before_close(tmp_path: Path) -> None:
    logger = MetricsLogger(config(tmp_path / "new" / "run"), 0)
    logger.log(1, {"reward/mean": 0.5})
    assert lines(tmp_path / "new" / "run") == [{"step": 1, "reward/mean": 0.5}]
    logger.close()


def test_resume_drops_later_steps_and_a_torn_last_line(tmp_path: Path) -> None:
    first = MetricsLogger(config(tmp_path), 0)
    for step in range(5):
        first.log(step, {"reward/mean": float(step)})
    first.close()
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"step": 5, "rewa')
    second = MetricsLogger(config(tmp_path), 3)
    second.log(3, {"reward/mean": 30.0})
    second.close()
    assert [(line["step"], line["reward/mean"]) for line in lines(tmp_path)] == [
        (0, 0.0),
        (1, 1.0),
        (2, 2.0),
        (3, 30.0),
    ]


def test_a_torn_line_of_an_earlier_step_is_dropped_too(tmp_path: Path) -> None:
    (tmp_path / METRICS_FILE).write_text('{"step": 1, "a": 1.0}\n{"step": 2, "a"')
    MetricsLogger(config(tmp_path), 9).close()
    assert lines(tmp_path) == [{"step": 1, "a": 1.0}]


def test_every_line_is_strict_json_even_with_nan(tmp_path: Path) -> None:
    logger = MetricsLogger(config(tmp_path), 0)
    logger.log(1, {"loss/policy": math.nan, "optim/grad_norm": math.inf})
    logger.close()
    text = (tmp_path / METRICS_FILE).read_text()
    assert json.loads(text) == {"step": 1, "loss/policy": None, "optim/grad_norm": None}
    assert math.isnan(read_metrics(tmp_path)[0]["loss/policy"])


def test_lines_of_one_step_are_merged_and_steps_are_sorted(tmp_path: Path) -> None:
    logger = MetricsLogger(config(tmp_path), 0)
    logger.log(2, {"a": 2.0})
    logger.log(1, {"a": 1.0})
    logger.log(2, {"eval/x/greedy_accuracy": 0.5})
    logger.close()
    assert read_metrics(tmp_path) == [{"step": 1, "a": 1.0}, {"step": 2, "a": 2.0, "eval/x/greedy_accuracy": 0.5}]


def test_a_folder_without_metrics_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=METRICS_FILE):
        read_metrics(tmp_path)
    (tmp_path / METRICS_FILE).write_text("")
    with pytest.raises(ConfigError, match="empty"):
        read_metrics(tmp_path)


def test_wandb_offline_writes_a_run_with_the_metrics(tmp_path: Path) -> None:
    logger = MetricsLogger(config(tmp_path, mode="offline", project="test"), 0)
    logger.log(1, {"reward/mean": 0.123456789})
    logger.close()
    (run,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    content = run.read_bytes()
    assert b"reward/mean" in content
    assert b"0.123456789" in content
    assert (tmp_path / "wandb-run-id").read_text().strip() in run.name


def test_a_wandb_that_cannot_start_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "5")
    with pytest.raises(ConfigError, match="track.wandb.mode"):
        MetricsLogger(config(tmp_path / "run", mode="online"), 0)
