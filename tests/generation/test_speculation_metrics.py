"""What drafts gave, by drafter, and the alarm about a head whose drafts are hardly ever accepted."""

from collections import Counter

import pytest

from megatron_rl.drafting.alarm import LiveAlarm
from megatron_rl.generation.speculation_metrics import speculation_metrics
from rollout.types import Rollout, SpeculationCounts, TokenSource

ROLLOUT = Rollout("p", 0, 0, 1, [5], [6, 7], [-1.0, -1.0], "stop", 0, [TokenSource.FRESH, TokenSource.DRAFT])
SMALL = SpeculationCounts(
    steps=4,
    verifications=10,
    drafted=30,
    accepted=12,
    emitted=22,
    seconds=1.0,
    drafted_by=Counter(eagle=20, ngram=10),
    accepted_by=Counter(eagle=3, ngram=9),
    tried_at=Counter({0: 10, 1: 2}),
    accepted_at=Counter({0: 2, 1: 1}),
)
LARGE = SpeculationCounts(
    steps=30,
    verifications=90,
    drafted=90,
    accepted=60,
    emitted=150,
    seconds=9.0,
    drafted_by=Counter(eagle=90),
    accepted_by=Counter(eagle=60),
    tried_at=Counter({0: 30, 1: 28, 2: 20}),
    accepted_at=Counter({0: 28, 1: 20, 2: 12}),
)
IDLE = SpeculationCounts(steps=5, verifications=5, emitted=5, seconds=1.0)


def test_the_counts_of_all_engines_are_added_before_anything_is_divided():
    metrics = speculation_metrics([ROLLOUT], [SMALL, IDLE, LARGE], ["eagle", "ngram"])
    assert metrics["speculation/drafted/eagle"] == 110 and metrics["speculation/drafted/ngram"] == 10
    assert metrics["speculation/accepted_fraction/eagle"] == 63 / 110
    assert metrics["speculation/accepted_fraction/ngram"] == 0.9
    assert metrics["drafter/live_drafts"] == 40
    assert metrics["drafter/live_length"] == 1 + 63 / 40
    accepted = [metrics[f"drafter/live_accepted_{place}"] for place in (1, 2, 3)]
    assert accepted == [30 / 40, 21 / 30, 12 / 20]
    assert "drafter/live_accepted_4" not in metrics


def test_plain_steps_and_other_drafters_say_nothing_about_the_head():
    ngram = SpeculationCounts(verifications=9, drafted=8, accepted=8, emitted=17, drafted_by=Counter(ngram=8))
    metrics = speculation_metrics([ROLLOUT], [IDLE, ngram], ["eagle", "ngram"])
    assert metrics["drafter/live_drafts"] == metrics["speculation/drafted/eagle"] == 0
    assert not [name for name in metrics if name.startswith(("drafter/live_length", "drafter/live_accepted"))]
    assert "speculation/accepted_fraction/eagle" not in metrics
    alone = speculation_metrics([ROLLOUT], [ngram], ["ngram"])
    assert not [name for name in alone if name.startswith("drafter/")]


def warned(caplog, alarm: LiveAlarm, steps: range, drafts: float, length: float, version: int = 3) -> list[int]:
    """The steps at which the alarm was raised."""
    raised = []
    for step in steps:
        caplog.clear()
        metrics = {"drafter/live_drafts": drafts} | ({"drafter/live_length": length} if drafts else {})
        alarm.observe(step, metrics, version)
        raised += [step] * len(caplog.records)
    return raised


def test_hardly_accepted_drafts_raise_an_alarm_that_is_repeated_every_tenth_step(caplog):
    alarm = LiveAlarm()
    assert warned(caplog, alarm, range(1, 24), 200, 1.01) == [1, 11, 21]
    assert warned(caplog, alarm, range(24, 26), 200, 1.5) == []
    assert warned(caplog, alarm, range(26, 30), 200, 1.01) == [26], "it had been well in between"


def test_the_alarm_says_what_was_seen_and_what_to_do(caplog):
    LiveAlarm().observe(7, {"drafter/live_drafts": 80.0, "drafter/live_length": 1.02}, 3)
    assert "step 7: the engines emit only 1.02 tokens per verification" in caplog.text
    assert "80 drafts, version 3" in caplog.text
    assert "megatron-rl drafter warmup" in caplog.text and "drafter.min_slices" in caplog.text


@pytest.mark.parametrize(("drafts", "expected"), [(0, []), (10, [5]), (49, [2]), (50, [1])])
def test_few_drafts_are_collected_until_there_are_enough_to_judge(drafts, expected, caplog):
    assert warned(caplog, LiveAlarm(), range(1, 11), drafts, 1.0) == expected


def test_accepted_drafts_raise_no_alarm(caplog):
    assert warned(caplog, LiveAlarm(), range(1, 12), 500, 1.06) == []
    LiveAlarm().observe(1, {}, 0)
    assert not caplog.records
