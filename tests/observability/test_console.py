"""What a run prints, on a terminal and into a log file."""

import io
import math
import threading

import pytest

from megatron_rl.observability import console as console_module
from megatron_rl.observability.console import HEADER_EVERY_ROWS, Console, greedy_accuracy
from megatron_rl.observability.terminal import Terminal

METRICS = {"reward/mean": 0.5, "response/length_mean": 40.0, "logprob_gap/mean": 3e-6, "time/step": 4.25}


def make(terminal: bool) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(True, Terminal(file=out, force_terminal=terminal, width=120)), out


def test_rows_are_aligned_with_the_header_and_missing_values_are_dashes() -> None:
    console, out = make(False)
    console.step(0, 60, {"eval/a/greedy_accuracy": 0.25})
    console.step(12, 60, METRICS)
    header, before, row = out.getvalue().splitlines()
    assert len(header) == len(before) == len(row)
    assert before.split() == ["0/60", "-", "25.0%"] + ["-"] * 8
    assert row.split()[:5] == ["12/60", "0.500", "-", "40.0", "3.0e-06"]


def test_the_header_comes_again() -> None:
    console, out = make(False)
    for step in range(HEADER_EVERY_ROWS + 1):
        console.step(step, 100, METRICS)
    assert out.getvalue().count("reward") == 2


def test_scoring_problems_are_noted_only_when_there_are_some() -> None:
    console, out = make(False)
    console.step(1, 9, METRICS | {"reward/errors": 0.0})
    console.step(2, 9, METRICS | {"reward/errors": 3.0})
    assert [line.endswith("3 reward errors") for line in out.getvalue().splitlines()] == [False, False, True]


def test_a_skipped_update_is_noted_with_its_key() -> None:
    console, out = make(False)
    console.step(1, 9, METRICS | {"correction/skipped_updates": 0.0})
    console.step(2, 9, METRICS | {"correction/skipped_updates": 1.0})
    assert ["algorithm.correction" in line for line in out.getvalue().splitlines()] == [False, False, True]


def test_what_reuse_and_drafting_saved_is_noted_where_it_is_worth_it() -> None:
    console, out = make(False)
    console.step(1, 9, METRICS)
    console.step(2, 9, METRICS | {"saved/reuse_s": 0.02, "saved/drafting_s": 0.0})
    console.step(3, 9, METRICS | {"saved/reuse_s": 1.26, "saved/drafting_s": -0.3})
    plain, small, both = out.getvalue().splitlines()[1:]
    assert "saved" not in plain + small
    assert both.endswith("  saved: reuse 1.3 s, drafting -0.3 s")


def test_a_value_that_is_not_a_number_does_not_break_the_row() -> None:
    console, out = make(False)
    console.step(1, 9, {"reward/mean": math.nan, "optim/grad_norm": math.inf})
    assert "inf" in out.getvalue()


def test_a_terminal_sees_progress_and_nothing_of_it_stays() -> None:
    console, out = make(True)
    with console.phase("generating", 8) as phase:
        phase.advance(8, note="99 tokens/s")
    text = out.getvalue()
    assert "generating" in text and "8/8" in text and "99 tokens/s" in text
    assert text.endswith("\x1b[1A\x1b[2K")  # the cursor goes up and the line is erased


def test_a_log_file_sees_no_control_codes_and_a_short_phase_is_silent() -> None:
    console, out = make(False)
    with console.phase("generating", 8) as phase:
        phase.advance(8)
    assert out.getvalue() == ""


def test_a_long_phase_says_in_a_log_file_that_it_is_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console_module, "FIRST_PLAIN_LINE_S", 0.0)
    monkeypatch.setattr(console_module, "PLAIN_LINE_EVERY_S", 0.0)
    console, out = make(False)
    with console.phase("generating", 8) as phase:
        phase.advance(3, note="99 tokens/s")
        phase.advance(5)
    assert out.getvalue().splitlines() == ["generating 3/8, 99 tokens/s", "generating 8/8"]


def test_a_log_file_gets_a_line_after_ten_seconds_and_then_now_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(console_module.time, "monotonic", lambda: now)
    console, out = make(False)
    with console.phase("generating", 100) as phase:
        for _ in range(100):
            now += 1.0
            phase.advance()
    assert out.getvalue().splitlines() == [f"generating {done}/100" for done in (10, 40, 70, 100)]


def test_a_dumb_terminal_is_a_log_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(console_module, "FIRST_PLAIN_LINE_S", 0.0)
    console, out = make(True)
    with console.phase("generating", 8) as phase:
        phase.advance(3)
    assert out.getvalue() == "generating 3/8\n"


def test_the_time_stands_still_between_the_items_of_a_measurement() -> None:
    console, out = make(True)
    before = threading.active_count()
    with console.phase("measuring", 2, ticking=False) as phase:
        assert threading.active_count() == before
        phase.advance(note="[static:eagle:4]")
        assert "1/2" in out.getvalue() and "[static:eagle:4]" in out.getvalue()


def test_the_parts_of_a_pass_add_up() -> None:
    heard: list[str] = []
    console = Console(False, on_progress=heard.append)
    with console.progress("training") as report:
        for _ in range(2):
            for done in (1, 2, 3):
                report(done, 3)
    assert [text.removeprefix("training ") for text in heard] == ["0/3", "1/3", "2/3", "3/3", "4/6", "5/6", "6/6"]
    heard.clear()
    with console.progress("nothing to do"):
        pass
    assert heard == []


def test_other_ranks_are_silent(capsys: pytest.CaptureFixture) -> None:
    console = Console(False)
    console.info("hello")
    console.step(1, 2, METRICS)
    with console.phase("generating", 1) as phase:
        phase.advance()
    assert capsys.readouterr().out == ""


def test_progress_of_silent_ranks_is_reported_too() -> None:
    heard: list[str] = []
    console = Console(False, on_progress=heard.append)
    with console.phase("training", 8) as phase:
        phase.advance(3)
    assert heard == ["training 0/8", "training 3/8"]


def test_a_failure_inside_a_phase_gets_out() -> None:
    console, _ = make(True)
    with pytest.raises(KeyError), console.phase("generating", 8):
        raise KeyError("engine")


def test_info_prints_brackets_as_they_are() -> None:
    console, out = make(False)
    console.info("file[red]name.jsonl")
    assert out.getvalue() == "file[red]name.jsonl\n"


def test_greedy_accuracy_is_the_mean_over_sets() -> None:
    assert greedy_accuracy({"eval/a/greedy_accuracy": 0.2, "eval/b/greedy_accuracy": 0.4}) == pytest.approx(0.3)
    assert greedy_accuracy({"eval/a/avg_at_k": 0.2}) is None
