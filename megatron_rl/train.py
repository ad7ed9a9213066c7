"""The RL loop: generate, score, old log-probs, update, hand over the weights. Every trainer process runs it.

Rank 0, the driver, also owns the fleet of engines, the data order, the rewards and the logs.
"""

import torch

from megatron_rl.algorithms import step_advantages
from megatron_rl.config import Config
from megatron_rl.distributed.preemption import StopRequest
from megatron_rl.distributed.runtime import initialize, shutdown
from megatron_rl.experiment import Experiment
from megatron_rl.metrics import Metrics
from megatron_rl.trainer.batch import Batch, with_values
from megatron_rl.trainer.schedule import is_due
from megatron_rl.trainer.trainer import UpdateResult


def run(config: Config) -> None:
    """Train the policy as `config` says, from the start or from the newest checkpoint of `config.run_dir`.

    After SIGTERM the run saves at the end of the step and returns; started again, it goes on from there.

    Raises:
        ConfigError: when the config does not fit the machine, the model, the data or an earlier run.
    """
    runtime = initialize(config)
    experiment = Experiment(config, runtime)
    with experiment:
        stop = StopRequest(runtime)
        if experiment.first_step == 1:
            metrics = evaluate(experiment, 0)
            experiment.log(0, metrics)
            experiment.keep_best(0, metrics)
        for step in range(experiment.first_step, config.train.steps + 1):
            metrics = train_step(experiment, step)
            evaluated = bool(config.due_sets(step))
            if evaluated:
                metrics |= evaluate(experiment, step)
            experiment.log(step, metrics)
            if evaluated:
                experiment.keep_best(step, metrics)
            stopping = stop.agreed()
            if stopping or is_due(step, config.checkpoint.every, config.train.steps):
                experiment.save(step)
            if stopping:
                experiment.console.info(f"stopped after step {step}, as SIGTERM asked; started again, the run goes on")
                break
        else:
            experiment.finish()
        stop.close()
    shutdown()


def train_step(experiment: Experiment, step: int) -> Metrics:
    """One RL step. Returns its metrics on the driver, by the names of `docs/metrics.md`."""
    config, trainer, clock = experiment.config, experiment.trainer, experiment.clock
    clock.start()

    scored = experiment.coordinator.drive(lambda: experiment.generator.training_rollouts(step))
    batch = Batch.from_rollouts(scored.rollouts)

    if experiment.scores_before_update(step):
        with (
            clock.phase("old_logprobs"),
            experiment.feeding_drafter(batch, step),
            experiment.progress("old log-probs") as progress,
        ):
            batch = with_values(batch, old_logprobs=trainer.logprobs(batch, progress))
    if experiment.reference is not None:
        with clock.phase("ref_logprobs"), experiment.progress("ref log-probs") as progress:
            batch = with_values(batch, ref_logprobs=experiment.reference.logprobs(batch, progress))

    rewards = torch.tensor(scored.rewards)
    groups = torch.arange(len(rewards)) // config.algorithm.group_size
    if experiment.critic is not None:
        with clock.phase("values"), experiment.progress("values") as progress:
            batch = with_values(batch, values=experiment.critic.values(batch, progress))
    batch = with_values(batch, **step_advantages(experiment.algorithm, rewards, groups, batch.lengths, batch.values))
    criticism: Metrics = {}
    if experiment.critic is not None:
        with clock.phase("critic_update"), experiment.progress("training the critic") as progress:
            criticism = experiment.critic.update(batch, progress)
    update: UpdateResult | None = None
    if experiment.trains_policy(step):
        with clock.phase("update"), experiment.progress("training") as progress:
            update = trainer.update(batch, experiment.algorithm, progress)
        batch = with_values(batch, old_logprobs=update.old_logprobs)

    with clock.phase("weight_sync"):
        experiment.pause_generation()
        sync = experiment.weight_sync.sync(step)

    drafts = experiment.train_drafter(batch, step, scored.metrics)

    return experiment.step_metrics(scored, batch, update) | sync | criticism | drafts


def evaluate(experiment: Experiment, step: int) -> Metrics:
    """Accuracy on the held-out sets that are due, measured by the fleet; the metrics on every rank."""
    return experiment.coordinator.drive(lambda: experiment.generator.evaluate(step))
