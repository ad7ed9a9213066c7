"""A whole experiment file.

The docstring under a field is what `megatron-rl config --explain KEY` prints. The sections `algorithm` and `rollout`
have files of their own, the others are in `sections`. Checks across keys are in `cross_checks`, those that need the
model's own `config.json` (heads by TP, layers by PP) in `model_fit`.
"""

from pydantic import model_validator

from megatron_rl.config import cross_checks
from megatron_rl.config.algorithm import AlgorithmConfig
from megatron_rl.config.heldout_sets import set_name
from megatron_rl.config.rollout import RolloutConfig
from megatron_rl.config.section import Section
from megatron_rl.config.sections import (
    CheckpointConfig,
    DataConfig,
    DrafterConfig,
    EvalConfig,
    ModelConfig,
    ParallelConfig,
    RewardConfig,
    TrackConfig,
    TrainConfig,
)


class Config(Section):
    """One experiment."""

    model: ModelConfig
    """The policy."""
    parallel: ParallelConfig = ParallelConfig()
    """How the trainer's model is split over devices."""
    data: DataConfig = DataConfig()
    """Prompts to train and evaluate on."""
    reward: RewardConfig = RewardConfig()
    """How a response is scored."""
    algorithm: AlgorithmConfig = AlgorithmConfig()
    """The policy-gradient algorithm."""
    train: TrainConfig = TrainConfig()
    """The optimisation."""
    rollout: RolloutConfig = RolloutConfig()
    """The fleet of vLLM engines."""
    drafter: DrafterConfig = DrafterConfig()
    """The trained drafter."""
    eval: EvalConfig = EvalConfig()
    """Evaluation on held-out prompts."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Saving and resuming."""
    track: TrackConfig = TrackConfig()
    """Metrics and reports."""
    run_dir: str
    """Folder for everything the run writes."""

    @property
    def scores_in_update(self) -> bool:
        """Whether the forward pass of the update gives the old log-probs, so that none is needed before it.

        With one update per step they are the log-probs of the update itself, unless they are needed earlier: for a
        correction that compares responses, a KL penalty in the reward, or a drafter that learns from the pass.
        """
        kl = self.algorithm.kl
        needed_before = (
            self.train.num_minibatches > 1,
            self.algorithm.correction.compares_responses,
            kl.coef > 0 and kl.place == "reward",
            self.rollout.speculation.uses_head and self.drafter.trains,
        )
        return not any(needed_before)

    def due_sets(self, step: int) -> list[str]:
        """Entries of `data.eval` to evaluate after `step`: all before the first step (0) and after the last."""
        if step in (0, self.train.steps):
            return list(self.data.eval)
        every = {spec: self.eval.schedule.get(set_name(spec), self.eval.every) for spec in self.data.eval}
        return [spec for spec, steps in every.items() if steps > 0 and step % steps == 0]

    @model_validator(mode="after")
    def _check(self) -> "Config":
        rollout, algorithm = self.rollout, self.algorithm
        cross_checks.check_training(self.train, algorithm, self.parallel)
        cross_checks.check_correction(algorithm.correction)
        if rollout.speculation.uses_head:
            cross_checks.check_drafter(self.parallel)
        cross_checks.check_lengths(self.data, self.train, rollout, self.reward)
        cross_checks.check_rollout(rollout, self.model, algorithm)
        cross_checks.check_overlap(rollout, algorithm, self.drafter)
        cross_checks.check_evaluation(self.data, self.eval)
        cross_checks.check_arithmetic(self.data)
        return self
