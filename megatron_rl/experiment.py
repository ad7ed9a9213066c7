"""Everything a run is made of: built at the start, saved, resumed, reported and taken down."""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from drafter.eagle.head_files import save_head
from megatron_rl.algorithms import load_algorithm, mismatch_metrics, needs_critic
from megatron_rl.algorithms.step import reward_kl
from megatron_rl.config import Config
from megatron_rl.distributed.coordinator import Coordinator
from megatron_rl.distributed.device import shared_store
from megatron_rl.distributed.engine_environment import engine_environment
from megatron_rl.distributed.runtime import Runtime
from megatron_rl.distributed.watchdog import Pulse, leave
from megatron_rl.drafting.initial_head import folder_for_engines, initial_head
from megatron_rl.drafting.online_drafter import CHECKPOINT_NAME, Drafting, frozen_policy
from megatron_rl.generation.generator import Generator
from megatron_rl.generation.precision_metrics import gap_metrics, warn_of_bias
from megatron_rl.metrics import Metrics
from megatron_rl.models.weights import export_hf
from megatron_rl.observability.console import Console
from megatron_rl.observability.metrics_logger import MetricsLogger
from megatron_rl.observability.report import write_report
from megatron_rl.preflight import begin
from megatron_rl.trainer.batch import Batch
from megatron_rl.trainer.best import best_folder, improvement, save_best
from megatron_rl.trainer.checkpoint import load_checkpoint, load_driver_state, load_tensors, save_checkpoint
from megatron_rl.trainer.critic import Critic
from megatron_rl.trainer.policy import Policy, Progress
from megatron_rl.trainer.trainer import Trainer
from megatron_rl.trainer.weight_sync import WeightSync
from rollout.fleet.fleet import RolloutFleet
from rollout.fleet.ray_watch import RayWatch
from rollout.types import Rollout

SPECULATION = "speculation"  # in checkpoints: what adaptive speculation has learned
HISTORY = "history"  # in checkpoints: earlier responses
POOL = "pool"  # in checkpoints: responses that are under way
REFILLS = "refills"  # in checkpoints: how far dynamic sampling has moved the order of the prompts


class Clock:
    """Seconds per phase of the current step; `enter_phase` is told the name of each."""

    def __init__(self, enter_phase: Callable[[str], None] = lambda name: None) -> None:
        self.seconds: Metrics = {}
        self._enter_phase = enter_phase
        self._started = time.perf_counter()

    def start(self) -> None:
        """Begin a step."""
        self.seconds = {}
        self._started = time.perf_counter()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure a block as `time/<name>`."""
        self._enter_phase(name)
        start = time.perf_counter()
        yield
        self.seconds[f"time/{name}"] = time.perf_counter() - start

    def elapsed(self) -> float:
        """Seconds since `start`."""
        return time.perf_counter() - self._started


class Experiment:
    """The parts of a run. On ranks other than the driver there is no fleet, generator or logger."""

    def __init__(self, config: Config, runtime: Runtime) -> None:
        """Build everything and resume from the newest checkpoint, if there is one.

        Raises:
            ConfigError: when the config does not fit the model, the machine, the data or an earlier run.
        """
        self.config, self.runtime = config, runtime
        self.pulse = Pulse(runtime.rank, runtime.world_size, shared_store(), config.train.hang_timeout_s)
        self.clock = Clock(self.pulse.enter)
        self.console = Console(runtime.is_driver, on_progress=self.pulse.beat)
        self.algorithm = load_algorithm(config.algorithm)
        start = begin(config, runtime)
        environment = engine_environment(config, start.vocab_limit)
        self.coordinator = Coordinator(runtime, self.pulse.enter)
        self.weight_sync: WeightSync
        self.fleet: RolloutFleet | None = None
        if runtime.is_driver:  # engines start while the trainer is built
            warn_of_bias(config)
            self.console.info(f"starting {config.rollout.engines} rollout engine(s), {runtime.world_size} trainer(s)")
            self.fleet = RolloutFleet(
                config,
                environment,
                config.model.path,
                on_restart=lambda engine: self.weight_sync.restore(engine),
                wait=False,
                drafter_path=folder_for_engines(config) if config.rollout.speculation.uses_head else None,
            )
        model = (start.arch, start.vocab_limit, config.rollout.temperature)
        self._ray_watch = RayWatch(leave) if runtime.is_driver else None
        self.trainer = Trainer(config, runtime, *model)
        self.reference = Policy(config, runtime, *model) if config.algorithm.kl.coef > 0 else None
        self.critic: Critic | None = None
        if needs_critic(config.algorithm):
            self.critic = Critic(config, runtime, start.arch)
            self.trainer.total_updates -= config.algorithm.critic.warmup_steps * config.train.num_minibatches
        if start.resumed:
            load_checkpoint(self.trainer, config.run_dir, start.resumed, self.critic)
            self.console.info(f"resuming after step {start.resumed} from {config.run_dir}")
        self.first_step = start.resumed + 1
        if self.fleet is not None:
            self.fleet.wait_until_up()
            if start.resumed and (learned := load_driver_state(config.run_dir, start.resumed, SPECULATION)):
                self.fleet.restore_speculation(learned)
            self.generator = Generator(config, start.tokenizer, self.fleet, self.console)
            if start.resumed:
                self.generator.refills = load_driver_state(config.run_dir, start.resumed, REFILLS) or 0
            if start.resumed and (under_way := load_tensors(config.run_dir, start.resumed, POOL)):
                self._restore_pool(under_way)
            if start.resumed and (earlier := load_tensors(config.run_dir, start.resumed, HISTORY)):
                self._restore_history(earlier)
            self._logger = MetricsLogger(config, start_step=self.first_step if start.resumed else 0)
        self.weight_sync = WeightSync(
            config, runtime, self.trainer.weights, environment.weight_sync, self.fleet, self.coordinator
        )
        self.weight_sync.sync(start.resumed)
        self.drafting = self._build_drafting(start.resumed) if config.rollout.speculation.uses_head else None

    def _restore_history(self, state: dict[str, Any]) -> None:
        if not self.generator.reuse.restore(state):
            self.console.info("earlier responses are not reused: they were sampled with other options")

    def _restore_pool(self, state: dict[str, Any]) -> None:
        if self.generator.overlap is None or not self.generator.overlap.pool.restore(state):
            self.console.info("responses that were under way are dropped: they were sampled with other options")

    def _build_drafting(self, resumed: int) -> Drafting:
        head = initial_head(self.config, frozen_policy(self.trainer.weights, self.trainer.vocab_limit))
        drafting = Drafting(self.config, self.runtime, self.trainer, head, self.coordinator, self.fleet)
        if resumed and (state := load_tensors(self.config.run_dir, resumed, CHECKPOINT_NAME)):
            drafting.restore(state)
        if drafting.tail is not None and self.runtime.is_driver:
            self.generator.watch = drafting.tail.watch
        drafting.start()
        return drafting

    def __enter__(self) -> "Experiment":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.pulse.close()
        if self._ray_watch is not None:
            self._ray_watch.close()
        self.weight_sync.shutdown()
        if self.fleet is not None:
            self.generator.close()
            self._logger.close()
            self.fleet.shutdown()

    def progress(self, name: str) -> contextlib.AbstractContextManager[Progress]:
        """A console progress line for a pass over micro-batches."""
        return self.console.progress(name)

    def pause_generation(self) -> None:
        """Stop the engines where they generate beside training: what follows needs them."""
        if self.runtime.is_driver and self.generator.overlap is not None:
            self.generator.overlap.pause()

    def trains_policy(self, step: int) -> bool:
        """Whether `step` updates the policy, or the critic alone."""
        return self.critic is None or step > self.config.algorithm.critic.warmup_steps

    def scores_before_update(self, step: int) -> bool:
        """Whether `step` needs a pass for old log-probs, which otherwise are those of the update itself."""
        return not (self.config.scores_in_update and self.trains_policy(step))

    def feeding_drafter(self, batch: Batch, step: int) -> contextlib.AbstractContextManager[None]:
        """Around a pass over the step's rollouts: the drafter, if there is one, learns from it."""
        return self.drafting.recording(batch, step) if self.drafting is not None else contextlib.nullcontext()

    def train_drafter(self, batch: Batch, step: int) -> Metrics:
        """What is left to do for the drafter in a step; its metrics on the driver."""
        if self.drafting is None:
            return {}
        seconds = self.clock.elapsed()
        tokens = sum(batch.sequence_length(index) for index in range(len(batch.prompts)))
        rollout_metrics = self.generator.metrics if self.runtime.is_driver else {}
        with self.clock.phase("drafter"):
            return self.drafting.finish_step(step, seconds, tokens, rollout_metrics)

    def step_metrics(self, rollouts: list[Rollout], batch: Batch, update: Metrics | None, sync: Metrics) -> Metrics:
        """All metrics of a step, whose `rollouts` make up `batch`, on the driver; elsewhere an empty dict.

        `update` is what the policy's update measured, None in a step without one.
        """
        if not self.runtime.is_driver:
            return {}
        seconds = self.clock.seconds | {"time/step": self.clock.elapsed()}
        gap = mismatch_metrics(batch.values["old_logprobs"], batch.values["rollout_logprobs"])
        metrics = {
            "logprob_gap/mean": gap["mean_abs"],
            "logprob_gap/max": gap["max_abs"],
            "correction/ess": gap["ess"],
            "correction/kl": gap["kl"],
        }
        kl = self.config.algorithm.kl
        if kl.coef > 0 and kl.place == "reward":
            metrics["reward/kl"] = reward_kl(batch.values, kl).mean().item()
        if update is not None:
            metrics |= self._update_metrics(rollouts, batch, update)
        return self.generator.metrics | metrics | sync | seconds

    def _update_metrics(self, rollouts: list[Rollout], batch: Batch, update: Metrics) -> Metrics:
        old, rollout = batch.values["old_logprobs"], batch.values["rollout_logprobs"]
        correction = self.trainer.correction
        sequences = sum(batch.sequence_length(index) for index in range(len(batch.prompts)))
        metrics = {
            **{f"correction/{name}": value for name, value in correction.metrics().items()},
            **gap_metrics(rollouts, old, rollout, correction),
            "correction/skipped_updates": update["skipped"] * self.config.train.num_minibatches,
            "loss/policy": update["policy_loss"],
            "loss/entropy": update["entropy"],
            "loss/clip_fraction": update["clip_fraction"],
            "loss/update_kl": update["update_kl"],
            "optim/grad_norm": update["grad_norm"],
            "optim/lr": update["lr"],
            "optim/skipped_updates": update["not_finite"] * self.config.train.num_minibatches,
            "throughput/trained_tokens_per_s": sequences / self.clock.seconds["time/update"],
        }
        if "kl" in update:
            metrics["loss/kl"] = update["kl"]
        metrics |= {name: value for name, value in update.items() if name.startswith("moe/")}
        return metrics

    def log(self, step: int, metrics: Metrics) -> None:
        """Write the step's metrics and show its row."""
        if self.runtime.is_driver:
            self._logger.log(step, metrics)
            self.console.step(step, self.config.train.steps, metrics)

    def save(self, step: int) -> None:
        """Checkpoint after `step`, whose metrics are already logged, and write the drafter's timeline."""
        self.pulse.enter("checkpoint")
        start = time.perf_counter()
        learned: dict[str, Any] | None = None
        if self.fleet is not None:
            learned = {SPECULATION: self.fleet.speculation_states(), REFILLS: self.generator.refills}
        tensors = {CHECKPOINT_NAME: self.drafting.state()} if self.drafting is not None else {}
        if self.runtime.is_driver and self.config.rollout.history.mode != "off":
            tensors[HISTORY] = self.generator.reuse.state()
        if self.runtime.is_driver and self.generator.overlap is not None:
            tensors[POOL] = self.generator.overlap.pool.state()
        keep = self.config.checkpoint.keep
        save_checkpoint(self.trainer, self.config.run_dir, step, keep, learned, tensors, self.critic)
        if self.drafting is not None:
            self.drafting.timeline.write(Path(self.config.run_dir))
        if self.runtime.is_driver:
            self._logger.log(step, {"time/checkpoint": time.perf_counter() - start})

    def keep_best(self, step: int, metrics: Metrics) -> None:
        """Save the policy to `run_dir/best` when, by `eval.best`, no evaluation before this one was as good.

        `metrics` are those of the evaluation after `step`, on the driver.
        """
        if self.config.eval.best is None:
            return
        value = self.coordinator.drive(lambda: improvement(self.config, step, metrics))
        if value is not None:
            save_best(self.trainer, self.config, step, value)
            self.console.info(f"{self.config.eval.best} = {value:.4f} is the best so far: {best_folder(self.config)}")

    def finish(self) -> None:
        """Export the policy and write the report."""
        self.pulse.enter("finishing")
        run_dir = Path(self.config.run_dir)
        if self.config.checkpoint.export_hf:
            export_hf(self.trainer.weights, self.config.model.path, run_dir / "hf")
            self.console.info(f"the trained model is in {run_dir / 'hf'}")
        if self.drafting is not None and self.runtime.is_driver:
            save_head(self.drafting.live.head, run_dir / "drafter")
            self.console.info(f"the drafter is in {run_dir / 'drafter'}")
        if self.runtime.is_driver and self.config.track.report:
            self.console.info(f"the report is in {write_report(run_dir)}")
