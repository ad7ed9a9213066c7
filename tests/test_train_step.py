"""What one step gives to the critic and to the policy, with models whose numbers are known."""

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_rl.algorithms import TokenCorrection, load_algorithm, needs_critic
from megatron_rl.clock import Clock
from megatron_rl.config import Config
from megatron_rl.experiment import Experiment
from megatron_rl.generation.generator import ScoredRollouts
from megatron_rl.train import train_step
from megatron_rl.trainer.batch import Batch
from megatron_rl.trainer.trainer import UpdateResult
from rollout.types import Rollout


class FixedExperiment:
    """An experiment of two responses, of 3 and 1 tokens, with the rewards 1 and -2."""

    trains_policy = Experiment.trains_policy
    scores_before_update = Experiment.scores_before_update

    def __init__(self, algorithm: dict[str, Any]) -> None:
        self.config = Config.model_validate(
            {"model": {"path": "m"}, "algorithm": {"group_size": 2} | algorithm, "run_dir": "r", "train": {"steps": 9}}
            | {"data": {"max_prompt_tokens": 8}, "rollout": {"max_tokens": 8}}
        )
        self.algorithm, self.clock = load_algorithm(self.config.algorithm), Clock()
        rollouts = [rollout(0, [5, 6, 7]), rollout(1, [8])]
        scored = ScoredRollouts(rollouts, [1.0, -2.0])
        self.generator = SimpleNamespace(training_rollouts=lambda step: scored)
        self.coordinator = SimpleNamespace(drive=lambda call: call())
        self.trainer = SimpleNamespace(logprobs=fixed(-1, -1, -1, -1), update=self._update_policy)
        self.reference = SimpleNamespace(logprobs=fixed(-1.2, -0.6, -1, -2))
        self.critic = None
        if needs_critic(self.config.algorithm):
            self.critic = SimpleNamespace(values=fixed(0.5, 0.4, 0.2, 0.3), update=self._update_critic)
        self.weight_sync = SimpleNamespace(sync=lambda step: {})
        self.learned: dict[str, Batch] = {}
        """The batch that each model learned from."""

    def pause_generation(self) -> None:
        """Nothing generates."""

    def _update_policy(self, batch: Batch, algorithm: Any, progress: Any) -> UpdateResult:
        assert algorithm is self.algorithm
        self.learned["policy"] = batch
        kept = torch.ones(4, dtype=torch.bool)
        correction = TokenCorrection(torch.ones(4), kept, ~kept, torch.zeros(2, dtype=torch.bool))
        return UpdateResult({"policy/loss": 1.0}, correction, old_logprobs=torch.full((4,), -1.5))

    def _update_critic(self, batch: Batch, progress: Any) -> dict[str, float]:
        self.learned["critic"] = batch
        return {"critic/loss": 1.0}

    def progress(self, name: str) -> Any:
        return contextlib.nullcontext()

    def feeding_drafter(self, batch: Batch, step: int) -> Any:
        return contextlib.nullcontext()

    def train_drafter(self, batch: Batch, step: int, rollout_metrics: Any) -> dict[str, float]:
        return {}

    def step_metrics(self, scored: Any, batch: Batch, update: UpdateResult | None) -> dict[str, float]:
        self.reported = batch
        return update.metrics if update is not None else {}


def rollout(sample: int, tokens: list[int]) -> Rollout:
    return Rollout(
        prompt_id="p",
        sample_index=sample,
        epoch=0,
        seed=0,
        prompt_ids=[1, 2],
        token_ids=tokens,
        logprobs=[-1.0] * len(tokens),
        finish_reason="stop",
        policy_version=0,
        sources=[0] * len(tokens),
    )


def fixed(*values: float) -> Any:
    return lambda batch, progress=None: torch.tensor(values)


def test_advantages_and_returns_by_hand() -> None:
    # As in tests/algorithms/test_step.py: KL off the rewards, gamma 0.9, lambda 0.5.
    kl = {"coef": 0.5, "place": "reward", "estimator": "k1"}
    critic = {"gamma": 0.9, "lam": 0.5}
    experiment = FixedExperiment({"name": "ppo", "kl": kl, "critic": critic, "normalize_std": False})
    metrics = train_step(experiment, 1)
    assert metrics == {"policy/loss": 1.0, "critic/loss": 1.0}
    learned = experiment.learned
    assert learned["policy"].values["advantages"].tolist() == pytest.approx([-0.087, 0.34, 0.8, -2.8])
    assert learned["critic"].values["returns"].tolist() == pytest.approx([0.413, 0.74, 1.0, -2.5])
    assert learned["critic"].values["values"].tolist() == pytest.approx([0.5, 0.4, 0.2, 0.3])
    assert {"time/values", "time/critic_update", "time/update"} <= experiment.clock.seconds.keys()


def test_the_first_steps_train_the_critic_alone() -> None:
    experiment = FixedExperiment({"name": "ppo", "critic": {"warmup_steps": 2}})
    assert train_step(experiment, 2) == {"critic/loss": 1.0}
    assert experiment.learned.keys() == {"critic"}
    assert experiment.reported.values["old_logprobs"].tolist() == [-1] * 4, "of a pass of their own"
    train_step(experiment, 3)
    assert experiment.learned.keys() == {"critic", "policy"}
    assert "old_logprobs" not in experiment.learned["policy"].values
    assert experiment.reported.values["old_logprobs"].tolist() == [-1.5] * 4, "of the update"


def test_without_a_critic_the_warm_up_is_nobodys() -> None:
    experiment = FixedExperiment({"name": "dr_grpo", "critic": {"warmup_steps": 2}})
    assert train_step(experiment, 1) == {"policy/loss": 1.0}
    assert experiment.learned["policy"].values["advantages"].tolist() == [1.5, 1.5, 1.5, -1.5]
