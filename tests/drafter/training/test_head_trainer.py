"""Slices of many rows, on many ranks, are one batch; what is not finite is dropped; a resumed training is the same."""

import copy
from pathlib import Path

import torch

from drafter.eagle.draft_loss import LossOptions, draft_loss
from drafter.eagle.head import EagleHead
from drafter.eagle.packed_rows import PackedFeatures, pack
from drafter.training.feature_store import FeatureStore
from drafter.training.head_trainer import DraftTrainer, OptimizerOptions
from tests.drafter.policies import random_policy, random_row, small_config
from tests.launching import run_workers

CONFIG = small_config()
STEPS = LossOptions(steps=3)


def make_trainer(head: EagleHead, rows: int = 6, warmup: int = 1) -> DraftTrainer:
    store = FeatureStore(10**9, 32, seed=5)
    store.add(1, new_rows(rows), [])
    trainer = DraftTrainer(head, store, STEPS, OptimizerOptions(lr=1e-2, warmup_steps=warmup))
    trainer.policy = random_policy(CONFIG)
    return trainer


def new_rows(count: int = 6) -> list[PackedFeatures]:
    return [random_row(CONFIG, [12], seed=seed) for seed in range(count)]


def new_head() -> EagleHead:
    torch.manual_seed(0)
    return EagleHead(CONFIG)


def run_slices(trainer: DraftTrainer, count: int) -> None:
    for _ in range(count):
        piece = trainer.next(lambda size: True)
        assert piece is not None
        piece.run()


def same(first: EagleHead, second: EagleHead) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_slices_add_up_to_the_gradient_of_one_batch():
    rows = [random_row(CONFIG, lengths, seed=seed) for seed, lengths in enumerate(([12, 7], [20], [5, 9, 4]))]
    trainer, head = make_trainer(new_head()), new_head()
    for row in rows:
        trainer.learn(row)
    loss = draft_loss(head, pack(rows), random_policy(CONFIG), STEPS)
    (loss.total / loss.weight).backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in head.parameters()])
    found = torch.cat([parameter.grad.flatten() for parameter in trainer.head.parameters()]) / loss.weight
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)
    report = trainer.flush()
    assert report.slices == 3 and report.stepped
    torch.testing.assert_close(report.grad_norm, float(expected.norm()), rtol=1e-4, atol=0)
    entropy = float(loss.step_cross_entropy.sum() / loss.step_counts.sum())
    torch.testing.assert_close(report.loss, entropy, rtol=1e-5, atol=0)


def test_training_lowers_the_loss_and_nothing_is_left_over_between_flushes():
    trainer = make_trainer(new_head())
    losses = []
    for _ in range(30):
        run_slices(trainer, 3)
        losses.append(trainer.flush().loss)
        assert trainer.slices == 0 and all(parameter.grad is None for parameter in trainer.head.parameters())
    assert losses[-1] < losses[0] - 0.05


def test_a_flush_without_slices_changes_nothing():
    trainer = make_trainer(new_head())
    report = trainer.flush()
    assert not report.stepped and report.slices == 0 and same(trainer.head, new_head()) and trainer.updates == 0


def test_a_gradient_that_is_not_finite_is_dropped():
    trainer = make_trainer(new_head())
    run_slices(trainer, 1)
    bad = random_row(CONFIG, [12])
    bad.hidden_states[3] = float("nan")
    trainer.learn(bad)
    assert not trainer.flush().stepped
    assert same(trainer.head, new_head())
    run_slices(trainer, 1)
    assert trainer.flush().stepped and all(p.isfinite().all() for p in trainer.head.parameters())


def test_there_are_no_slices_without_the_policy_or_features():
    trainer = make_trainer(new_head())
    trainer.policy = None
    assert trainer.next(lambda size: True) is None
    assert make_trainer(new_head(), rows=0).next(lambda size: True) is None


def test_the_learning_rate_rises_during_the_warm_up():
    moved = []
    for warmup in (1, 10):
        trainer = make_trainer(new_head(), warmup=warmup)
        run_slices(trainer, 1)
        trainer.flush()
        moved.append(float((trainer.head.fc.weight - new_head().fc.weight).abs().max().detach()))
    torch.testing.assert_close(moved[1], moved[0] / 10, rtol=1e-2, atol=0)


def test_a_resumed_training_ends_with_the_same_bits():
    whole = make_trainer(new_head())
    for step in range(6):
        run_slices(whole, 2)
        whole.flush()
        if step == 2:
            state = copy.deepcopy(whole.state())
            whole.store.forget()
            whole.store.add(2, new_rows(), [])
    resumed = make_trainer(EagleHead(CONFIG), rows=0)
    resumed.restore(state)
    resumed.store.add(2, new_rows(), [])
    for _ in range(3):
        run_slices(resumed, 2)
        resumed.flush()
    assert same(whole.head, resumed.head) and not same(whole.head, new_head())


def test_ranks_with_unequal_numbers_of_slices_take_the_step_of_one_batch(tmp_path: Path):
    run_workers("tests.drafter.training.flush_worker", 2, tmp_path)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    assert [rank["slices"] for rank in ranks] == [2, 2] and ranks[0]["own"] == 0
    alone = make_trainer(new_head())
    for seed in range(2):
        alone.learn(random_row(CONFIG, [9 + seed], seed=seed))
    alone.flush()
    for name, value in alone.head.state_dict().items():
        assert torch.equal(ranks[0]["head"][name], ranks[1]["head"][name])
        torch.testing.assert_close(ranks[0]["head"][name], value, atol=1e-5, rtol=1e-4)


def test_norms_of_a_head_do_not_decay_unless_asked():
    heads = {}
    for name, options in {"none": (0.0, False), "usual": (0.5, False), "all": (0.5, True)}.items():
        heads[name] = new_head()
        trainer = make_trainer(heads[name])
        trainer._options = OptimizerOptions(lr=1e-2, warmup_steps=1, weight_decay=options[0], decay_all=options[1])
        trainer.reset_optimizer()
        run_slices(trainer, 2)
        trainer.flush()
    named = {name: dict(head.named_parameters()) for name, head in heads.items()}
    vectors = [name for name, value in named["none"].items() if value.ndim == 1]
    assert vectors
    for name, value in named["none"].items():
        assert torch.equal(named["usual"][name], value) == (name in vectors), name
        assert not torch.equal(named["all"][name], value), name
