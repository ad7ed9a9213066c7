"""Which process hangs, and where."""

import threading
import time

import pytest
import torch

from megatron_rl.distributed.watchdog import WAITING, Pulse, Report, verdict


def report(phase: str, phases: int, beats: int, still_s: float, detail: str = "") -> Report:
    return Report("n1", phase, detail, phases, beats, still_s)


def test_progress_of_one_process_is_enough() -> None:
    reports = {0: report(WAITING, 7, 0, 500), 1: report("update", 7, 3, 2)}
    assert verdict(reports, {0: 0, 1: 0}, 100) is None


def test_the_process_that_is_furthest_behind_is_named_with_its_phase() -> None:
    reports = {
        0: report("update", 9, 4, 120),
        1: report("old_logprobs", 8, 2, 130, "old log-probs 2/8"),
        2: report("update", 9, 1, 125),
    }
    sentence = verdict(reports, dict.fromkeys(reports, 0.0), 100)
    assert sentence is not None
    assert "rank 1 on n1 hangs in the phase 'old_logprobs' (old log-probs 2/8), for 130 s" in sentence


def test_within_a_phase_the_fewest_micro_batches_tell() -> None:
    reports = {0: report("update", 9, 4, 120), 1: report("update", 9, 3, 120), 2: report("update", 9, 4, 120)}
    assert "rank 1 " in str(verdict(reports, dict.fromkeys(reports, 0.0), 100))


def test_who_waits_for_the_driver_is_not_to_blame() -> None:
    reports = {0: report("driving", 5, 17, 300, "generating 17/256"), 1: report(WAITING, 5, 0, 400)}
    assert "rank 0 on n1 hangs in the phase 'driving' (generating 17/256)" in str(verdict(reports, {0: 0, 1: 0}, 100))


def test_a_silent_process_is_named_though_others_move() -> None:
    reports = {0: report("update", 9, 4, 0), 1: report("update", 9, 3, 1)}
    sentence = verdict(reports, {0: 1, 1: 150}, 100)
    assert "rank 1 on n1 has not been heard of for 150 s; it was in the phase 'update'" in str(sentence)


@pytest.fixture
def store() -> torch.distributed.Store:
    return torch.distributed.HashStore()


def test_the_driver_gives_up_on_a_rank_that_stands_still(store, capfd: pytest.CaptureFixture[str]) -> None:
    verdicts: list[str] = []
    over = threading.Event()
    driver = Pulse(0, 2, store, 0.4, lambda sentence: (verdicts.append(sentence), over.set()))
    other = Pulse(1, 2, store, 0.4)
    other.enter("update")
    driver.enter("update")
    driver.enter("weight_sync")
    assert over.wait(10)
    driver.close()
    other.close()
    assert "rank 1" in verdicts[0] and "'update'" in verdicts[0]
    errors = capfd.readouterr().err
    assert verdicts[0] in errors and "most recent call first" in errors


def test_no_verdict_while_everybody_moves(store) -> None:
    verdicts: list[str] = []
    pulses = [Pulse(rank, 2, store, 0.8, verdicts.append) for rank in range(2)]
    for beat in range(20):
        time.sleep(0.08)
        for pulse in pulses:
            pulse.beat(f"training {beat}/20")
    for pulse in pulses:
        pulse.close()
    assert verdicts == []


def test_without_a_limit_nobody_watches(store) -> None:
    pulse = Pulse(0, 1, store, None)
    pulse.enter("update")
    pulse.close()
    assert not store.check(["health/0"])
