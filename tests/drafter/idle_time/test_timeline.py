"""The timeline of a step."""

import json

import pytest

from drafter.idle_time.timeline import KINDS, Span, Timeline, read_trace, rows, write_trace
from megatron_rl.observability import plots

STEP = [[Span("forward", 10.0, 11.0), Span("bubble, filled", 11.0, 13.5)], [Span("bubble, empty", 10.5, 11.0)]]


def test_nothing_is_noted_unless_recording():
    timeline = Timeline()
    timeline.add("forward", 0, 1)
    timeline.add_wait(1, 2, 3, [])
    assert timeline.spans == []


def test_a_wait_is_cut_into_slices_gaps_and_transfer():
    timeline = Timeline()
    timeline.start()
    timeline.add_wait(0.0, 8.0, 10.0, [(1.0, 3.0), (3.0, 5.0), (8.5, 9.0)])
    assert timeline.spans == [
        Span("bubble, empty", 0.0, 1.0),
        Span("bubble, filled", 1.0, 3.0),
        Span("bubble, filled", 3.0, 5.0),
        Span("bubble, empty", 5.0, 8.0),
        Span("communication", 8.0, 8.5),
        Span("bubble, filled", 8.5, 9.0),
        Span("communication", 9.0, 10.0),
    ]


def test_a_slice_may_outlast_the_wait():
    timeline = Timeline()
    timeline.start()
    timeline.add_wait(0.0, 2.0, 2.5, [(1.0, 4.0)])
    assert timeline.spans == [Span("bubble, empty", 0.0, 1.0), Span("bubble, filled", 1.0, 4.0)]


def test_a_tail_has_slices_and_gaps_but_no_transfer():
    timeline = Timeline()
    timeline.start()
    timeline.add_wait(0.0, 4.0, 4.0, [(1.0, 2.0), (3.5, 4.5)], "tail")
    assert timeline.spans == [
        Span("tail, empty", 0.0, 1.0),
        Span("tail, filled", 1.0, 2.0),
        Span("tail, empty", 2.0, 3.5),
        Span("tail, filled", 3.5, 4.5),
    ]


def test_the_trace_has_one_process_per_rank_in_microseconds(tmp_path):
    write_trace(STEP, tmp_path / "trace.json", 7)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert [event["args"]["name"] for event in events if event["ph"] == "M"] == ["rank 0", "rank 1"]
    spans = [(event["pid"], event["name"], event["ts"], event["dur"]) for event in events if event["ph"] == "X"]
    assert spans[0] == (0, "forward", 0.0, pytest.approx(1e6))
    assert spans[2] == (1, "bubble, empty", pytest.approx(5e5), pytest.approx(5e5))


def test_a_trace_is_read_as_it_was_written_but_from_zero(tmp_path):
    write_trace(STEP, tmp_path / "trace.json", 7)
    ranks, step = read_trace(tmp_path / "trace.json")
    assert step == 7
    assert [[span.kind for span in spans] for spans in ranks] == [["forward", "bubble, filled"], ["bubble, empty"]]
    times = [(span.start, span.end) for spans in ranks for span in spans]
    assert times == [pytest.approx(pair) for pair in ((0.0, 1.0), (1.0, 3.5), (0.5, 1.0))]


@pytest.mark.parametrize(
    "text", ["", "[]", '{"traceEvents": []}', '{"traceEvents": [{"ph": "X", "name": "new", "ts": 0}], "otherData": {}}']
)
def test_a_file_that_is_no_timeline_is_refused(text, tmp_path):
    (tmp_path / "timeline.json").write_text(text)
    with pytest.raises(ValueError, match=r"timeline\.json is not the timeline of a step"):
        read_trace(tmp_path / "timeline.json")


def test_rows_for_a_plot_are_by_kind_from_zero():
    kinds = rows(STEP)
    assert list(kinds) == ["forward", "bubble, filled", "bubble, empty"]
    assert kinds["bubble, empty"] == [(1, 0.5, 0.5)]


def test_every_kind_of_span_has_a_colour_of_its_own():
    assert len({plots.SPAN_COLOURS[kind] for kind in KINDS}) == len(KINDS)
