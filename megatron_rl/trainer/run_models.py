"""The models of a run: the policy, and what its algorithm needs beside it."""

from dataclasses import dataclass

from megatron_rl.algorithms import CriticAlgorithm, PolicyLoss
from megatron_rl.config import Config
from megatron_rl.distributed.runtime import Runtime
from megatron_rl.models.architecture import Architecture
from megatron_rl.trainer.checkpoint import load_checkpoint
from megatron_rl.trainer.critic import Critic
from megatron_rl.trainer.policy import Policy
from megatron_rl.trainer.trainer import Trainer


@dataclass(frozen=True)
class RunModels:
    """On every rank, its part of each model."""

    trainer: Trainer
    """The policy."""
    reference: Policy | None
    """The frozen policy of `model.path`, for a KL penalty."""
    critic: Critic | None
    """For an algorithm that needs one."""


def build_models(
    config: Config, runtime: Runtime, algorithm: PolicyLoss, arch: Architecture, vocab_limit: int, resumed: int
) -> RunModels:
    """Build them from `model.path`, or with the weights and optimizers of a checkpoint.

    Args:
        config: the experiment.
        runtime: this process's place.
        algorithm: of the run.
        arch: shape of all models.
        vocab_limit: token ids from here on are excluded from every distribution.
        resumed: the step after which to resume; 0: from the start.

    Raises:
        ConfigError: when `model.path` or the checkpoint cannot be used.
    """
    policy = (config, runtime, arch, vocab_limit, config.rollout.temperature)
    with_critic = isinstance(algorithm, CriticAlgorithm)
    critic_steps = config.algorithm.critic.warmup_steps if with_critic else 0
    trainer = Trainer(*policy, steps=config.train.steps - critic_steps)
    reference = Policy(*policy) if config.algorithm.kl.coef > 0 else None
    critic = Critic(config, runtime, arch) if with_critic else None
    if resumed:
        load_checkpoint(trainer, config.run_dir, resumed, critic)
    return RunModels(trainer, reference, critic)
