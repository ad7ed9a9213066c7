"""The trainer's pure parts."""

import pytest

from megatron_rl.config.sections import TrainConfig
from megatron_rl.trainer.schedule import learning_rate


def test_learning_rate_warms_up_then_stays():
    train = TrainConfig(lr=1.0, warmup_steps=4)
    assert [learning_rate(train, step, 10) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(("schedule", "middle"), [("linear", 0.55), ("cosine", 0.55)])
def test_learning_rate_decays_to_its_floor(schedule: str, middle: float):
    train = TrainConfig(lr=1.0, min_lr_ratio=0.1, lr_schedule=schedule)
    assert learning_rate(train, 0, 10) == pytest.approx(1.0)
    assert learning_rate(train, 5, 10) == pytest.approx(middle)
    assert learning_rate(train, 10, 10) == pytest.approx(0.1)
