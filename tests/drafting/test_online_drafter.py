"""The drafter beside real updates on two pipeline stages: the same bits after a resume, idle time used, versions."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from drafter.idle_time.slices import Filled
from drafter.idle_time.timeline import read_trace
from megatron_rl.distributed.coordinator import Coordinator
from megatron_rl.drafting.tail_filler import TailFiller
from tests.hf_models import make_models
from tests.launching import run_workers

WORKER = "tests.drafting.drafting_worker"
STEPS, SAVE_AT = 4, 2


def load(folder: Path) -> list[dict]:
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A run of four steps that saved after two, with its `whole` results."""
    root = tmp_path_factory.mktemp("drafting")
    make_models(root)
    run_workers(WORKER, 2, root / "qwen3", root / "run", STEPS, SAVE_AT, root / "whole")
    return root


def test_a_resumed_run_ends_with_the_same_bits(root: Path):
    driver = load(root / "whole")[0]
    whole, resumed = driver["exact"], driver["resumed"]
    assert len(resumed["metrics"]) == STEPS - SAVE_AT
    for kind in ("head", "live"):
        for name, value in whole[kind].items():
            assert torch.equal(value, resumed[kind][name]), f"{kind} {name}"
    assert resumed["metrics"] == whole["metrics"][SAVE_AT:]
    assert resumed["pushed"][0][0] == whole["metrics"][SAVE_AT - 1]["drafter/version"], "engines get the live head"


def test_ranks_hold_the_same_head_and_the_engines_the_best_one(root: Path):
    for kind in ("exact", "filled"):
        driver, other = (rank[kind] for rank in load(root / "whole"))
        for name, value in driver["head"].items():
            assert torch.equal(value, other["head"][name]), name
        versions = [version for version, _ in driver["pushed"]]
        assert versions == list(range(len(versions))) and len(versions) > 1, "the head learns, so it is published"
        last = driver["pushed"][-1][1]
        assert all(torch.equal(last[name], value) for name, value in driver["live"].items())
        assert other["pushed"] == [] and other["metrics"] == [{}] * len(other["metrics"])


def test_metrics_of_a_step(root: Path):
    metrics = load(root / "whole")[0]["exact"]["metrics"]
    for step, values in enumerate(metrics, start=1):
        assert values["drafter/slices"] >= 6, "the tokens of three full slices on each rank"
        assert math.isfinite(values["drafter/loss"]) and values["drafter/grad_norm"] > 0
        assert 1 <= values["drafter/heldout_length"] <= 4
        assert 0 <= values["drafter/accepted_1"] <= 1
        assert 0 <= values["drafter/age"] < step + 1


def test_idle_time_is_used_except_in_the_steps_left_out_to_compare(root: Path):
    metrics = load(root / "whole")[0]["filled"]["metrics"]
    tails = [values["drafter/tail_filled_s"] for values in metrics]
    slices = [values["drafter/slices"] for values in metrics]
    assert tails[0] == 0, "nothing to learn from yet"
    assert all(seconds > 0 for seconds in tails[1:5]) and tails[5] == 0, "the sixth step is left unfilled"
    assert all(count > 0 for count in slices[1:5]) and slices[0] == slices[5] == 0
    # Bubbles of so small a model may have no room for a slice; that slices run in them is shown with the communicator.
    assert all(values["drafter/bubble_available_s"] > 0 for values in metrics)
    for values in metrics:
        assert values["drafter/bubble_filled_s"] <= values["drafter/bubble_available_s"] + 1e-6
        assert values["drafter/tail_filled_s"] <= values["drafter/tail_available_s"] + 1e-6


def test_the_timeline_shows_the_newest_filled_step_of_both_ranks(root: Path):
    ranks, step = read_trace(root / "run-none" / "timeline.json")
    assert step == 5, "the sixth is left unfilled"
    assert len(ranks) == 2
    for spans in ranks:
        kinds = [span.kind for span in spans]
        assert {"tail, filled", "forward", "backward"} <= set(kinds)
        assert kinds.count("forward") == 2 * kinds.count("backward"), "one pass for log-probs, one for the update"
        for before, after in zip(spans, spans[1:], strict=False):
            assert after.start >= before.end - 1e-3, "a rank does one thing at a time, the tail first"
    first = [next(span.start for span in spans if span.kind == "forward") for spans in ranks]
    assert 0 < first[1] - first[0] < 5, "the second stage waits for the first, on the same clock"

    metrics = load(root / "whole")[0]["filled"]["metrics"][step - 1]
    for idle in ("bubble", "tail"):
        spent = sum(span.end - span.start for spans in ranks for span in spans if span.kind == f"{idle}, filled")
        # The last slice of a wait may outlast it, which the metric does not count.
        assert 2 * metrics[f"drafter/{idle}_filled_s"] <= spent + 1e-6
    assert not (root / "run" / "timeline.json").exists(), "nothing is filled there"


class FakeFill:
    """Waits without a thread; notes what it was asked to fill."""

    def __init__(self) -> None:
        self.runner = SimpleNamespace(clock=lambda: 0.0)
        self.waits = 0

    def during(self, operation, expected):
        self.waits += 1
        return operation(), 0.0, Filled()


def tail_of(begins_at: float) -> tuple[TailFiller, FakeFill]:
    fill = FakeFill()
    coordinator = Coordinator(SimpleNamespace(is_driver=True))
    coordinator._exchange = lambda message: message
    coordinator._driving = True
    return TailFiller(fill, coordinator, begins_at), fill


@pytest.mark.parametrize(("begins_at", "waits"), [(0.0, 8), (0.75, 2), (1.0, 0)])
def test_a_tail_begins_when_most_rollouts_are_done(begins_at: float, waits: int):
    tail, fill = tail_of(begins_at)
    assert list(tail.watch(iter(range(1, 9)), 8)) == list(range(1, 9))
    assert fill.waits == waits
    tail.enabled = False
    assert list(tail.watch(iter(range(1, 9)), 8)) == list(range(1, 9))
    assert fill.waits == waits


def test_an_iterator_that_ends_early_ends_the_tail():
    tail, _ = tail_of(0.0)
    assert list(tail.watch(iter([1, 2]), 8)) == [1, 2]
