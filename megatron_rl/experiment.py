"""Everything a run is made of: built at the start, saved, resumed, reported and taken down."""

import contextlib
import time
from dataclasses import asdict
from pathlib import Path
from types import TracebackType

from megatron_rl.algorithms import load_algorithm
from megatron_rl.clock import Clock
from megatron_rl.config import Config
from megatron_rl.distributed.coordinator import Coordinator
from megatron_rl.distributed.runtime import Runtime
from megatron_rl.distributed.watchdog import start_pulse
from megatron_rl.drafting.build_drafting import build_drafting, engine_head
from megatron_rl.generation.generator import Generator, ScoredRollouts
from megatron_rl.generation.precision_metrics import warn_of_bias
from megatron_rl.generation.prompt_sets import PromptSets, read_sets
from megatron_rl.metrics import Metrics
from megatron_rl.models.token_ids import state_ends
from megatron_rl.observability.console import Console
from megatron_rl.observability.metrics_logger import MetricsLogger
from megatron_rl.observability.report import write_report
from megatron_rl.preflight import Start, begin, keep_config
from megatron_rl.step_metrics import step_metrics
from megatron_rl.trainer.batch import Batch
from megatron_rl.trainer.best import best_folder, improvement, save_best
from megatron_rl.trainer.checkpoint import load_state, save_checkpoint, saved_states
from megatron_rl.trainer.fleet_start import start_fleet
from megatron_rl.trainer.model_check import compare, load_reference
from megatron_rl.trainer.pipeline_model import Progress
from megatron_rl.trainer.resume import RECORD, RunRecord, check_resumed
from megatron_rl.trainer.run_models import build_models
from megatron_rl.trainer.trainer import UpdateResult

LEFT_OUT = {
    "pool": "responses that were under way are dropped",
    "history": "earlier responses are not reused",
}
"""What it means that a state of a checkpoint is of no use to a run with other options, by the name of the part."""


class Experiment:
    """The parts of a run. On ranks other than the driver there are no engines, generator or logger."""

    def __init__(self, config: Config, runtime: Runtime) -> None:
        """Build everything and resume from the newest checkpoint, if there is one.

        Args:
            config: the experiment.
            runtime: this process's place.

        Raises:
            ConfigError: when the config does not fit the model, the machine, the data or an earlier run.
        """
        self.config, self.runtime = config, runtime
        self.pulse = start_pulse(runtime, config.train.hang_timeout_s)
        self._open = contextlib.ExitStack()
        """What has to be taken down, in whatever state the building of the rest ends."""
        try:
            self._build()
        except BaseException:
            with contextlib.suppress(Exception):  # what has failed is told already; nothing is to follow it
                self._close()
            raise

    def _build(self) -> None:
        config, runtime = self.config, self.runtime
        self.clock = Clock(self.pulse.enter)
        self.console = Console(runtime.is_driver, on_progress=self.pulse.beat)
        self.algorithm = load_algorithm(config.algorithm)
        start = begin(config, runtime)
        self.first_step, self._tokens = start.resumed + 1, start.tokens
        self.coordinator = Coordinator(runtime, self.pulse.enter)
        sets = self._read_sets(start) if runtime.is_driver else None
        self.console.info(f"starting {config.rollout.engines} rollout engine(s), {runtime.world_size} trainer(s)")
        # The engines start while the trainer is built.
        self._fleet = start_fleet(
            config, runtime, self.coordinator, start.tokens, drafter_path=engine_head(config, runtime)
        )
        self._open.callback(self._fleet.shutdown)
        models = build_models(config, runtime, self.algorithm, start.arch, start.tokens.limit, start.resumed)
        self.trainer, self.reference, self.critic = models.trainer, models.reference, models.critic
        if start.resumed:
            self.console.info(f"resuming after step {start.resumed} from {config.run_dir}")
        compared = config.model.check == "auto" and not start.resumed
        reference = None
        if compared and runtime.is_driver:
            reference = load_reference(config, start.arch, start.tokens.limit, self.console)
        self.weight_sync = self._fleet.connect(self.trainer.weights)
        self._parts = self._fleet.parts()
        """What checkpoints carry beside the models, by name, in the order in which it is restored."""
        if self._fleet.engines is not None and sets is not None:
            self.generator = Generator(config, start.tokenizer, sets, self._fleet.engines, self.console)
            self._open.callback(self.generator.close)
            self._parts |= self.generator.parts()
            self._logger = MetricsLogger(config, start_step=self.first_step if start.resumed else 0)
            self._open.callback(self._logger.close)
        self.weight_sync.sync(start.resumed)
        if compared:
            prompt = self.generator.first_prompt if runtime.is_driver else []
            compare(reference, config, self.trainer, self._fleet.engines, self.coordinator, self.console, prompt)
        self._drafting = build_drafting(config, runtime, self.trainer, self.coordinator, self._fleet.engines)
        if self._drafting is not None:
            self._parts["drafter"] = self._drafting
            if self._drafting.tail is not None and runtime.is_driver:
                self.generator.add_watch(self._drafting.tail.watch)
        if start.resumed:
            self._restore_parts(start.resumed)
        if self._drafting is not None:
            self._drafting.start()

    def _read_sets(self, start: Start) -> PromptSets:
        """The prompts, and whether an earlier run in this folder can go on with them; on the driver."""
        config = self.config
        warn_of_bias(config)
        sets = read_sets(config, start.tokenizer)
        self._open.callback(sets.scorer.close)
        self._record = RunRecord.of(config, sets.train, start.tokenizer, start.arch)
        if start.resumed:
            saved, force = load_state(config.run_dir, start.resumed, RECORD), config.checkpoint.resume == "force"
            check_resumed(saved, self._record, start.resumed, force, self.console)
        keep_config(config, self.runtime)
        return sets

    def _restore_parts(self, resumed: int) -> None:
        left_out = set(saved_states(self.config.run_dir, resumed))
        for name, part in self._parts.items():
            state = load_state(self.config.run_dir, resumed, name)
            if state is not None and part.restore(state):
                left_out.discard(name)
        for name in LEFT_OUT.keys() & left_out:
            self.console.info(f"{LEFT_OUT[name]}: they were sampled with other options")

    def __enter__(self) -> "Experiment":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        self.pulse.close()
        self._open.close()

    def progress(self, name: str) -> contextlib.AbstractContextManager[Progress]:
        """A console progress line for a pass over micro-batches."""
        return self.console.progress(name)

    def pause_generation(self) -> None:
        """Stop the engines where they generate beside training: what follows needs them."""
        if self.runtime.is_driver:
            self.generator.pause()

    def trains_policy(self, step: int) -> bool:
        """Whether `step` updates the policy, or the critic alone."""
        return self.critic is None or step > self.config.algorithm.critic.warmup_steps

    def scores_before_update(self, step: int) -> bool:
        """Whether `step` needs a pass for old log-probs, which otherwise are those of the update itself."""
        return not (self.config.scores_in_update and self.trains_policy(step))

    def feeding_drafter(self, batch: Batch, step: int) -> contextlib.AbstractContextManager[None]:
        """Around a pass over the step's rollouts: the drafter, if there is one, learns from it."""
        return self._drafting.recording(batch, step) if self._drafting is not None else contextlib.nullcontext()

    def train_drafter(self, batch: Batch, step: int, rollout_metrics: Metrics) -> Metrics:
        """What is left to do for the drafter in a step; its metrics on the driver.

        Args:
            batch: the step's.
            step: its number.
            rollout_metrics: what the engines measured of the drafts.
        """
        if self._drafting is None:
            return {}
        seconds = self.clock.elapsed()
        with self.clock.phase("drafter"):
            return self._drafting.finish_step(step, seconds, batch.sequence_tokens, rollout_metrics)

    def step_metrics(self, scored: ScoredRollouts, batch: Batch, update: UpdateResult | None) -> Metrics:
        """See `megatron_rl.step_metrics`, with the times; on the driver, elsewhere an empty dict."""
        if not self.runtime.is_driver:
            return {}
        seconds = self.clock.seconds | {"time/step": self.clock.elapsed()}
        return step_metrics(self.config, scored, batch, update, seconds)

    def log(self, step: int, metrics: Metrics) -> None:
        """Write the step's metrics and show its row."""
        if self.runtime.is_driver:
            self._logger.log(step, metrics)
            self.console.step(step, self.config.train.steps, metrics)

    def save(self, step: int) -> None:
        """Checkpoint after `step`, whose metrics are already logged, and write the drafter's timeline."""
        self.pulse.enter("checkpoint")
        start = time.perf_counter()
        states = {name: part.state() for name, part in self._parts.items()}
        if self.runtime.is_driver:
            states[RECORD] = asdict(self._record)
        save_checkpoint(self.trainer, self.config.run_dir, step, self.config.checkpoint.keep, states, self.critic)
        if self._drafting is not None:
            self._drafting.timeline.write(Path(self.config.run_dir))
        if self.runtime.is_driver:
            self._logger.log(step, {"time/checkpoint": time.perf_counter() - start})

    def keep_best(self, step: int, metrics: Metrics) -> None:
        """Save the policy to `run_dir/best` when, by `eval.best`, no evaluation before this one was as good.

        Args:
            step: of the evaluation.
            metrics: what it measured.
        """
        if self.config.eval.best is None:
            return
        value = self.coordinator.drive(lambda: improvement(self.config, step, metrics))
        if value is not None:
            save_best(self.trainer, self.config, step, value)
            self.console.info(f"{self.config.eval.best} = {value:.4f} is the best so far: {best_folder(self.config)}")

    def finish(self) -> None:
        """Export the policy and the drafter, and write the report."""
        self.pulse.enter("finishing")
        run_dir = Path(self.config.run_dir)
        if self.config.checkpoint.export_hf:
            self.trainer.export_hf(run_dir / "hf")
            if self.runtime.is_driver:
                state_ends(run_dir / "hf", self._tokens)
            self.console.info(f"the trained model is in {run_dir / 'hf'}")
        if self._drafting is not None and self.runtime.is_driver:
            self._drafting.export(run_dir / "drafter")
            self.console.info(f"the drafter is in {run_dir / 'drafter'}")
        if self.runtime.is_driver and self.config.track.report:
            self.console.info(f"the report is in {write_report(run_dir)}")
