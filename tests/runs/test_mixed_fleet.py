"""Runs with engines of several precisions, as a user starts them: what they report, and that they resume."""

import os
import signal
import time
from pathlib import Path

import pytest

from tests.capabilities import require_int8
from tests.runs.test_train import _read, assert_same_metrics, experiment, metrics, run, start

__all__ = ["experiment"]  # a fixture
FLEET = [
    "rollout.verify_weights=false",
    "rollout.engines=2",
    "rollout.quantization=[int8,none]",
    "rollout.precision_tail=0.9",  # most responses of a random model are as long as they may be
    "rollout.sleep=1",
    "parallel.pp_size=1",
]
TIMED = ("/seconds", "/tokens_per_s", "/discarded_tokens")


def reproducible(run_dir: Path) -> dict[int, dict[str, float]]:
    return {
        step: {name: value for name, value in values.items() if not name.endswith(TIMED)}
        for step, values in metrics(run_dir).items()
    }


@pytest.mark.slow
def test_a_killed_run_of_a_mixed_fleet_continues_as_if_nothing_had_happened(experiment: Path) -> None:
    require_int8()
    whole, killed = (experiment.parent / name for name in ("mixed", "mixed-killed"))
    run(experiment, f"run_dir={whole}", *FLEET)
    log = _read(experiment.parent / "log.txt")
    assert "rollout.quantization" not in log, "nothing to warn of: the correction is on"
    last = metrics(whole)[3]
    assert last["precision/none/tokens"] > 0 and last["precision/int8/tokens"] > 0
    assert last["precision/none/logprob_gap_mean"] < 1e-4 < last["precision/int8/logprob_gap_mean"]

    process = start(experiment, f"run_dir={killed}", *FLEET)
    deadline = time.monotonic() + 200
    while '"step": 1,' not in _read(killed / "metrics.jsonl"):
        assert process.poll() is None and time.monotonic() < deadline, _read(experiment.parent / "log.txt")[-4000:]
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    run(experiment, f"run_dir={killed}", *FLEET)
    assert_same_metrics(reproducible(killed), reproducible(whole))
