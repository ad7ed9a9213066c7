"""Only a better head is published; a broken one is dropped and the live one comes back."""

import torch

from drafter.eagle.expected_acceptance import expected_acceptance
from drafter.eagle.head import EagleHead
from drafter.training.publication import Decision, LiveHead, decide, score
from tests.drafter.policies import random_policy, random_row, small_config

CONFIG = small_config()


def test_decisions():
    assert decide(2.01, 2.0) is Decision.PUBLISH
    assert decide(2.0, 2.0) is Decision.KEEP_TRAINING
    assert decide(1.95, 2.0) is Decision.KEEP_TRAINING
    assert decide(1.85, 2.0) is Decision.RESTORE
    assert decide(float("nan"), 2.0) is Decision.RESTORE
    assert decide(float("inf"), 2.0) is Decision.RESTORE
    assert decide(1.5, float("nan")) is Decision.PUBLISH
    assert decide(1.001, 1.04) is Decision.KEEP_TRAINING, "noise near 1 does not throw training away"


def test_a_head_with_nan_weights_is_scored_as_such():
    head, row, policy = EagleHead(CONFIG), random_row(CONFIG, [12, 9]), random_policy(CONFIG)
    with torch.no_grad():
        head.fc.weight[0, 0] = float("nan")
    assert decide(score(head, [row], policy, 3, 1.0).expected_length, 1.0) is Decision.RESTORE


def test_scores_of_rows_add_up():
    head, policy = EagleHead(CONFIG), random_policy(CONFIG)
    rows = [random_row(CONFIG, [12, 9], seed=1), random_row(CONFIG, [20], seed=2)]
    both = score(head, rows, policy, 3, 0.7)
    parts = [expected_acceptance(head, row, policy, 3, 0.7) for row in rows]
    torch.testing.assert_close(both.accepted, parts[0].accepted + parts[1].accepted)
    assert not score(head, [], policy, 3, 1.0).reached.any()


def test_the_live_head_is_a_copy_and_comes_back():
    trained = EagleHead(CONFIG)
    live = LiveHead(trained)
    before = trained.fc.weight.detach().clone()
    with torch.no_grad():
        trained.fc.weight += 1
    assert torch.equal(live.head.fc.weight, before) and live.version == 0
    live.restore_into(trained)
    assert torch.equal(trained.fc.weight, before)
    with torch.no_grad():
        trained.fc.weight += 2
    live.publish(trained, step=7)
    assert torch.equal(live.head.fc.weight, before + 2) and (live.version, live.step) == (1, 7)
    other = LiveHead(EagleHead(CONFIG))
    other.restore(live.state())
    assert torch.equal(other.head.fc.weight, before + 2) and (other.version, other.step) == (1, 7)
