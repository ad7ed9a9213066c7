"""report.md from metrics, complete or not."""

import io
import json
from pathlib import Path

import matplotlib.image
import pytest
import yaml

from drafter.idle_time.timeline import Span, write_trace
from megatron_rl.observability.metrics_logger import METRICS_FILE
from megatron_rl.observability.plots import publications, speculation_timeline
from megatron_rl.observability.report import (
    accuracy_rows,
    drafter_line,
    history_line,
    print_summary,
    speculation_line,
    time_rows,
    write_report,
)
from megatron_rl.observability.terminal import Terminal

EVAL = "eval/arithmetic-heldout/greedy_accuracy"


def write_run(run_dir: Path, records: list[dict]) -> None:
    run_dir.mkdir(exist_ok=True)
    (run_dir / METRICS_FILE).write_text("".join(json.dumps(record) + "\n" for record in records))


def full_run() -> list[dict]:
    records: list[dict] = [{"step": 0, EVAL: 0.25, "time/eval": 2.0}]
    for step in range(1, 5):
        record = {"step": step, "reward/mean": 0.2 * step, "reward/std": 0.1, "response/length_mean": 40.0}
        record |= {f"response/length_p{p}": 30.0 + p / 10 for p in (5, 25, 50, 75, 95)}
        record |= {"logprob_gap/mean": 1e-6, "logprob_gap/max": 1e-5}
        record |= {
            "speculation/draft_token_fraction": 0.1 * step,
            "speculation/tokens_per_verification": 1 + 0.2 * step,
        }
        record |= {
            "drafter/heldout_length": 1.0 + 0.25 * step,
            "drafter/trained_length": 1.5,
            "drafter/live_drafts": 0.0,
        }
        record |= {"drafter/bubble_available_s": 2.0, "drafter/bubble_filled_s": 1.0, "drafter/version": step // 2}
        record |= {"drafter/tail_available_s": 3.0 * (step > 1), "drafter/tail_filled_s": 2.0 * (step > 1)}
        record |= {"history/reused_tokens": 60.0, "history/drafted_tokens": 10.0, "history/generated_tokens": 30.0}
        record |= {"saved/reuse_s": 1.25}
        record |= {"time/generate": 2.0, "time/update": 1.0, "time/step": 4.0}
        records.append(record)
    records[-1][EVAL] = 0.75
    records[-1] |= {"drafter/live_drafts": 30.0, "drafter/live_length": 2.0, "drafter/fill_cost": 0.012}
    records[-2] |= {"drafter/live_drafts": 10.0, "drafter/live_length": 1.2}
    return records


def test_the_report_has_tables_and_readable_plots(tmp_path: Path) -> None:
    write_run(tmp_path, full_run())
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"train": {"lr": 0.5, "steps": 4}}))
    text = write_report(tmp_path).read_text()
    assert "| arithmetic-heldout, greedy | 25.0% | 75.0% | +50.0 points |" in text
    assert "| generate | 8.0 s | 2.00 s | 50% |" in text
    assert "| `train.lr` | 0.5 |" in text
    assert "Not shown" not in text
    for name in ("reward", "accuracy", "length", "logprob_gap", "time", "speculation", "history", "drafter", "idle"):
        assert f"(report-{name}.png)" in text
        image = matplotlib.image.imread(tmp_path / f"report-{name}.png")
        assert image.shape[1] > 600
        assert image.std() > 0.01  # not an empty canvas


def test_missing_metrics_skip_their_plots_and_say_so(tmp_path: Path) -> None:
    write_run(tmp_path, full_run())
    write_report(tmp_path)
    write_run(tmp_path, [{"step": 1, "reward/mean": 0.5}])
    text = write_report(tmp_path).read_text()
    assert "![Reward]" in text
    assert "Not shown, because the run has no such metrics: held-out accuracy, response length" in text
    assert "no config.yaml" in text
    assert sorted(file.name for file in tmp_path.glob("*.png")) == [
        "report-reward.png"
    ]  # no plot of the earlier report


def test_null_values_are_skipped(tmp_path: Path) -> None:
    write_run(tmp_path, [{"step": 1, "reward/mean": None, "time/step": 1.0}, {"step": 2, "reward/mean": 0.5}])
    assert "![Reward]" in write_report(tmp_path).read_text()


def test_a_gap_of_exactly_zero_draws_no_logarithmic_plot(tmp_path: Path) -> None:
    write_run(tmp_path, [{"step": 1, "reward/mean": 1.0, "logprob_gap/mean": 0.0, "logprob_gap/max": 0.0}])
    assert "log-probability gap" in write_report(tmp_path).read_text().split("Not shown")[1]


def test_time_outside_the_phases_is_other() -> None:
    step = {"step": 1, "time/generate": 2.0, "time/step": 4.0, "time/eval": 4.0}  # the evaluation is not in the step
    assert time_rows([{"step": 0, "time/eval": 9.0}, step]) == [
        ("generate", "2.0 s", "2.00 s", "25%"),
        ("evaluation", "4.0 s", "4.00 s", "50%"),
        ("other", "2.0 s", "2.00 s", "25%"),
        ("all", "8.0 s", "8.00 s", "100%"),
    ]


def test_accuracy_measured_once_is_no_change() -> None:
    assert accuracy_rows([{"step": 0, EVAL: 0.5}]) == [
        ("arithmetic-heldout, greedy", "50.0%", "50.0%", "measured once")
    ]


@pytest.mark.parametrize(
    ("records", "expected"), [(full_run(), "+50.0 points"), ([{"step": 1, "a": 1}], "no evaluation")]
)
def test_the_summary_names_the_change(tmp_path: Path, records: list[dict], expected: str) -> None:
    write_run(tmp_path, records)
    out = io.StringIO()
    print_summary(tmp_path, Terminal(file=out, width=100))
    assert expected in out.getvalue()


def test_speculation_is_one_sentence(tmp_path: Path) -> None:
    write_run(tmp_path, full_run())
    sentence = "25% of the generated tokens came from drafts, 1.50 tokens per verification."
    assert sentence in write_report(tmp_path).read_text()
    assert speculation_line([{"step": 1.0}]) == ""


def test_history_is_one_sentence(tmp_path: Path) -> None:
    write_run(tmp_path, full_run())
    sentence = "History: 60% of the tokens were reused, about 5.0 s of generation saved."
    assert sentence in write_report(tmp_path).read_text()
    assert history_line([{"step": 1.0}]) == ""


def test_the_drafter_is_one_sentence(tmp_path: Path) -> None:
    write_run(tmp_path, full_run())
    sentence = (
        "Trained drafter: 2 versions published, tokens per verification on held-out rollouts 1.25 -> 2.00, "
        "1.80 in the engines, 59% of 17.0 idle seconds filled, steps 1.2% slower for it."
    )
    assert sentence in write_report(tmp_path).read_text()
    out = io.StringIO()
    print_summary(tmp_path, Terminal(file=out, width=300))
    assert sentence in out.getvalue()


def test_the_drafters_sentence_has_no_part_that_was_not_measured() -> None:
    assert drafter_line([{"step": 1.0, "reward/mean": 1.0}]) == ""
    untrained = [{"step": 1.0, "drafter/version": 1.0, "drafter/live_drafts": 0.0}]
    assert drafter_line(untrained) == "Trained drafter: 1 version published."
    faster = [{"step": 1.0, "drafter/version": 0.0, "drafter/fill_cost": -0.02}]
    assert drafter_line(faster) == "Trained drafter: 0 versions published, steps 2.0% faster for it."


def test_the_timeline_of_a_step_is_drawn_from_its_file(tmp_path: Path) -> None:
    write_run(tmp_path, full_run())
    tail = [Span("tail, empty", 0.0, 3.0), Span("tail, filled", 3.0, 5.0)]
    step = [Span("forward", 7.0, 7.1), Span("backward", 7.1, 7.3), Span("bubble, filled", 7.3, 7.4)]
    for spans in ([[*tail, *step], step], [tail, tail], [step, step]):
        write_trace(spans, tmp_path / "timeline.json", 3)
        text = write_report(tmp_path).read_text()
        assert "![Timeline of step 3](report-timeline.png)" in text
        assert matplotlib.image.imread(tmp_path / "report-timeline.png").std() > 0.01
    (tmp_path / "timeline.json").unlink()
    assert "Timeline" not in write_report(tmp_path).read_text()
    assert not (tmp_path / "report-timeline.png").exists()


def test_a_version_is_published_in_the_step_where_its_number_rises() -> None:
    versions = [(1, 1.0), (2, 1.0), (3, 2.0), (4, 3.0)]
    records = [{"step": 0.0}] + [{"step": step, "drafter/version": version} for step, version in versions]
    assert publications(records) == [1, 3, 4]


def test_the_timeline_is_drawn(tmp_path: Path) -> None:
    steps = [(0.1 * number, max(64 >> number, 1), "plain" if number < 3 else "ngram:8", 64) for number in range(9)]
    speculation_timeline(steps, tmp_path / "timeline.png")
    assert matplotlib.image.imread(tmp_path / "timeline.png").std() > 0
