"""Tables where the output is not a terminal: nothing breaks them, and nothing but text is written."""

import dataclasses
import json
import os
import pty
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_rl import doctor, evaluate
from megatron_rl.calibration.profile_file import LayerProfile, profile_table
from megatron_rl.calibration.smoothquant import Losses
from megatron_rl.cluster.plan import plan
from megatron_rl.cluster.slurm import Job
from megatron_rl.config import load_config
from megatron_rl.drafting import bench
from megatron_rl.evaluation.statistics import Estimate
from megatron_rl.observability.benchmark_results import publish
from megatron_rl.observability.metrics_logger import METRICS_FILE
from megatron_rl.observability.report import print_summary
from megatron_rl.observability.terminal import PLAIN_WIDTH, standard_output
from rollout.types import Rollout, SpeculationCounts
from tests.gpu_models import QWEN25_7B
from tests.launching import ROOT

LONG = "needs nothing that this machine does not have, " * 4 + "so it is fine"


def rollout(sample: int) -> Rollout:
    values = {field.name: None for field in dataclasses.fields(Rollout)}
    return Rollout(**values | {"prompt_id": "0", "sample_index": sample, "token_ids": [1, 2, 3]})


def bench_tables(folder: Path) -> None:
    turns = [bench.Turn(12345, 1.5, [rollout(0), rollout(1)], SpeculationCounts(), 0.25)] * 2
    rows = [bench._row(64, f"static:eagle:{k}", turns, 1.23456, turns) for k in (1, 16)]
    publish("speculative decoding", {"adaptive_vs_best_static_min": 1.0}, rows, folder / "result.json", True)


def plan_tables(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(QWEN25_7B))
    settings = load_config(ROOT / "configs" / "qwen2.5-7b-grpo-8gpu.yaml", [f"model.path={folder}"])
    plan(settings, Job(1, 8, 8), "h100", None, 1000)


def doctor_tables(folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(doctor, "probe", lambda program: (1, LONG))
        doctor.examine()


def eval_tables(folder: Path) -> None:
    estimate = Estimate(**{field.name: 0.5 for field in dataclasses.fields(Estimate)})
    name = "a-set-whose-name-is-that-of-a-file-in-a-deep-folder-and-goes-on-beyond-eighty-columns"
    evaluate.publish({name: {"greedy": estimate, "avg@16": estimate}}, folder)


def report_tables(folder: Path) -> None:
    records = [{"step": step, "eval/" + "heldout-" * 12 + "/avg_at_k": 0.5, "time/step": 2.0} for step in (0, 1)]
    (folder / METRICS_FILE).write_text("".join(json.dumps(record) + "\n" for record in records))
    print_summary(folder)


TABLES = {
    bench_tables: ["static:eagle:16", "1.235", "4/4", "adaptive_vs_best_static_min", "tok/verify"],
    plan_tables: ["at the peak", "engine (vLLM)", "7.62 B parameters", "limits the step"],
    doctor_tables: [LONG, "what that means", "Environment of a trainer process (one per node)"],
    eval_tables: ["and-goes-on-beyond-eighty-columns", "50.0% to 50.0%", "results of every problem"],
    report_tables: ["heldout-" * 12 + ", avg@k", "+0.0 points"],
}
"""What prints tables -> texts that must stand in one piece."""


def table_rows(text: str) -> list[list[str]]:
    """The cells of all rows, without the headings."""
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines() if line[:1] == "│"]


@pytest.mark.parametrize("show", TABLES)
def test_no_cell_is_broken_where_the_output_is_not_a_terminal(
    show: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    show(tmp_path)
    text = capsys.readouterr().out
    for piece in TABLES[show]:
        assert piece in text
    assert "\x1b" not in text and "\r" not in text and "…" not in text and text.endswith("\n")
    rows = table_rows(text)
    # A cell that is broken goes on in a row in which other cells are empty; the doctor has rows without a meaning.
    assert len(rows) >= 2 and all(all(row[:-1]) for row in rows), text


@pytest.mark.parametrize("show", TABLES)
def test_a_width_that_the_user_sets_is_kept(
    show: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "72")
    show(tmp_path)
    rows = [line for line in capsys.readouterr().out.splitlines() if line[:1] in "┏┃┡│└"]
    assert rows and max(map(len, rows)) <= 72


def test_the_table_of_layers_stands_in_one_piece(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    losses = Losses(0.1, 0.2, 0.3)
    names = [f"model.{'decoder.' * 12}layers.{layer}.mlp.gate_up_proj" for layer in range(3)]
    standard_output().print(profile_table({name: LayerProfile(losses, losses, 0.5, 0.95, False) for name in names}))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["layer", *names]
    assert all(line.split()[1:] == ["0.1000", "0.1000", "0.5", "0.95", "20.0%", "30.0%"] for line in lines[1:])


def test_a_terminal_has_its_own_width_and_colors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    leader, follower = pty.openpty()
    with os.fdopen(leader, "rb"), os.fdopen(follower, "w") as file:
        terminal = standard_output(file)
        assert terminal.is_interactive and terminal.color_system is not None
        assert terminal.width < PLAIN_WIDTH


def test_names_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    standard_output().print("static:eagle:4")
    assert capsys.readouterr().out == "static:eagle:4\n"


def test_consoles_are_made_in_one_place() -> None:
    folders = ("megatron_rl", "rollout", "drafter", "benchmarks")
    texts = {file.name: file.read_text() for folder in folders for file in (ROOT / folder).rglob("*.py")}
    assert {name for name, text in texts.items() if "rich.console" in text or "Terminal(" in text} == {"terminal.py"}
