"""Filling in real pipelines: nothing computed changes, and a dead rank is noticed as before."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from drafter.idle_time.timeline import KINDS
from tests.launching import ROOT

JOBS = ("2x1", "4x1", "3x2", "3x1x20", "simulate100")


def run_jobs(folder: Path, *jobs: str) -> dict[str, list[int]]:
    """The exit codes of each job's ranks; the jobs' files are in `folder`."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.drafter.idle_time.pipeline_worker", str(folder), *jobs],
        capture_output=True,
        text=True,
        timeout=280,
        env=os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
    )
    print(done.stdout, done.stderr)
    return {job: list(map(int, (folder / job / "codes").read_text().split())) for job in jobs}


@pytest.fixture(scope="module")
def jobs(tmp_path_factory) -> tuple[Path, dict[str, list[int]]]:
    folder = tmp_path_factory.mktemp("pipelines")
    return folder, run_jobs(folder, *JOBS)


@pytest.mark.parametrize(("stages", "chunks"), [(2, 1), (4, 1), (3, 2)], ids=["pp2", "pp4", "pp3-interleaved"])
def test_filling_changes_neither_losses_nor_gradients_by_a_bit(stages: int, chunks: int, jobs):
    folder, codes = jobs[0] / f"{stages}x{chunks}", jobs[1]
    assert codes[f"{stages}x{chunks}"] == [0] * stages
    for rank in range(stages):
        result = torch.load(folder / f"rank{rank}.pt")
        for name in ("unfilled", "filled"):
            for (plain_losses, plain), (losses, gradients) in zip(result["plain"], result[name], strict=True):
                assert losses == plain_losses
                assert len(losses) == (0 if rank < stages - 1 else 4 if chunks == 1 else 2 * stages)
                for expected, gradient in zip(plain, gradients, strict=True):
                    assert (expected is None) == (gradient is None)
                    assert expected is None or torch.equal(expected, gradient)
        assert any(gradient.abs().sum() > 0 for gradient in result["plain"][0][1])
        assert all(gradient is None for gradient in result["plain"][1][1])  # the forward-only pass
        assert result["flushes"] == [True] * 6  # plain, unfilled and four filled updates
        check_stats(result)
    check_trace(folder / "trace.json", stages)


def check_stats(result: dict) -> None:
    assert result["unfilled stats"]["slices"] == 0 == result["unfilled stats"]["filled"]
    assert result["unfilled stats"]["available"] > 0
    assert result["filled stats"]["slices"] == result["slices"] > 0
    assert 0 < result["filled stats"]["filled"] <= result["filled stats"]["available"]


def check_trace(file: Path, stages: int) -> None:
    events = json.loads(file.read_text())["traceEvents"]
    assert {event["pid"] for event in events} == set(range(stages))
    spans = [event for event in events if event["ph"] == "X"]
    assert {event["name"] for event in spans} >= {"forward", "backward", "bubble, filled"}
    assert {event["name"] for event in spans} <= set(KINDS)
    for rank in range(stages):
        mine = sorted((event["ts"], event["ts"] + event["dur"]) for event in spans if event["pid"] == rank)
        for (_, end), (start, _) in zip(mine, mine[1:], strict=False):
            assert start >= end - 1e-3, "a rank does one thing at a time"


def test_a_rank_that_dies_in_a_slice_fails_the_others_soon(jobs):
    folder, codes = jobs
    assert codes["3x1x20"][0] == 7
    for rank in (1, 2):
        assert codes["3x1x20"][rank] == 1
        seconds, _, error = (folder / "3x1x20" / f"rank{rank}.txt").read_text().partition(" ")
        assert float(seconds) < 30
        assert "gloo" in error or "onnection" in error


def test_random_schedules_complete(jobs):
    assert jobs[1]["simulate100"] == [0]


@pytest.mark.slow
def test_a_thousand_random_schedules_complete(tmp_path: Path):
    assert run_jobs(tmp_path, "simulate1000") == {"simulate1000": [0]}
