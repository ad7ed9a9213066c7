"""An engine whose worker process dies is replaced whole, and its responses are the same."""

import logging
import os
import signal
from pathlib import Path

import psutil
import pytest

from rollout.fleet.fleet import RolloutFleet
from tests.rollout.helpers import make_config, make_environment, make_requests, tokens_by_key

pytestmark = pytest.mark.slow


def test_a_killed_worker_of_an_engine_costs_nothing_but_time(
    fleet: RolloutFleet, model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    requests = make_requests(24, samples=4, max_tokens=60)
    undisturbed = tokens_by_key(fleet, requests)
    restarted: list[int] = []
    config = make_config(tmp_path, model, tp_size=2)
    split = RolloutFleet(config, make_environment(), str(model), on_restart=restarted.append)
    try:
        (pid,) = split.pids()
        workers = [child for child in psutil.Process(pid).children() if "Worker" in child.name()]
        assert len(workers) == 2, [child.name() for child in psutil.Process(pid).children(recursive=True)]
        stream = split.generate(requests)
        rollouts = [next(stream)]
        os.kill(workers[1].pid, signal.SIGKILL)
        with caplog.at_level(logging.WARNING):
            rollouts += stream
        assert len(rollouts) == 96, "every request is answered once"
        assert {(r.prompt_id, r.sample_index): r.token_ids for r in rollouts} == undisturbed
        assert restarted == [0] and split.pids() != [pid]
        assert "Rollout engine 0 died; restarting it (1/2)" in caplog.text
        _, left = psutil.wait_procs([workers[0]], timeout=30)
        assert not left, "the engine's other worker has ended with it"
    finally:
        split.shutdown()
