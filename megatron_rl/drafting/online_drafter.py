"""The drafter's part in a step of the run: taps features, trains the head in idle time, publishes it when it is better.

    step: generate (tail: slices) -> old log-probs (features tapped) -> update (bubbles: slices)
          -> `finish_step`: the missing slices, one optimizer step, scores, publication

The head is trained in float32 on every trainer rank, beside a frozen copy of the policy's embedding and head in the
trainer's dtype: 2 x vocabulary x hidden numbers on every rank (half of it when they are tied), taken together with the
features so that both belong to the same weights. The live head, which the engines have, is kept as well.
"""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from drafter.eagle.draft_loss import LossOptions
from drafter.eagle.expected_acceptance import ExpectedAcceptance
from drafter.eagle.head import EagleHead
from drafter.eagle.head_files import head_tensors, save_head
from drafter.eagle.packed_rows import FrozenPolicy
from drafter.idle_time.fill_guard import FillGuard
from drafter.idle_time.pipeline_bubbles import BubbleStats
from drafter.idle_time.slices import SliceRunner
from drafter.training.feature_store import FeatureStore
from drafter.training.head_trainer import DraftTrainer, Flush, OptimizerOptions
from drafter.training.publication import Decision, LiveHead, decide, score
from megatron_rl.config import Config, ConfigError
from megatron_rl.distributed.coordinator import Coordinator
from megatron_rl.distributed.runtime import Runtime
from megatron_rl.drafting.alarm import LiveAlarm
from megatron_rl.drafting.feature_tap import FeatureTap, plan_windows
from megatron_rl.drafting.step_timeline import StepTimeline
from megatron_rl.drafting.tail_filler import TailFiller
from megatron_rl.drafting.wait_fill import idle_fill
from megatron_rl.metrics import Metrics
from megatron_rl.models.weights import PolicyWeights
from megatron_rl.trainer.batch import Batch
from megatron_rl.trainer.pipeline_model import PipelineModel
from megatron_rl.trainer.trainer import Trainer

if TYPE_CHECKING:
    from rollout.fleet.fleet import RolloutFleet

log = logging.getLogger(__name__)
CHECKPOINT_NAME = "drafter"
TAIL_BEGINS_AT = 0.75


def frozen_policy(weights: PolicyWeights, vocab_limit: int) -> FrozenPolicy:
    """A copy of the policy's embedding and output layer, on every rank; a collective operation of the replica.

    Token ids from `vocab_limit` on are never sampled: the output layer is without them.
    """
    full = dict(weights.full({"model.embed_tokens.weight", "lm_head.weight"}))
    embedding = full["model.embed_tokens.weight"]
    return FrozenPolicy(embedding=embedding, lm_head=full.get("lm_head.weight", embedding)[:vocab_limit])


class FeatureSupply:
    """Fills a store from passes of the policy, and gives the training the policy's weights to go with it."""

    def __init__(self, policy: PipelineModel, head: EagleHead, store: FeatureStore) -> None:
        self._policy, self._store = policy, store
        self._tap = FeatureTap(policy, head.config.aux_layers)

    @contextlib.contextmanager
    def recording(self, batch: Batch, version: int, tokens: int) -> Iterator[None]:
        """Store at most `tokens` tokens of what the pass over `batch` in the block computes, as those of `version`."""
        config = self._policy.config
        windows = plan_windows(batch, version, config.drafter.tokens_per_slice, tokens, config.train.seed)
        with self._tap.recording(batch, windows):
            yield
        rows = self._tap.take()
        self._store.add(
            version,
            [row for window, row in rows if not window.held_out],
            [row for window, row in rows if window.held_out],
        )


class Drafting:
    """The drafter of a run. All methods are called on every rank, but the fleet is the driver's."""

    def __init__(
        self,
        config: Config,
        runtime: Runtime,
        policy: Trainer,
        head: EagleHead,
        coordinator: Coordinator,
        fleet: "RolloutFleet | None",
    ) -> None:
        """Build the drafter's trainer, and the fillers of idle time that `drafter.fill` names.

        Args:
            config: the experiment.
            runtime: this process's place.
            policy: whose hidden states the head learns from.
            head: float32 and the same on all ranks (see `megatron_rl.drafting.initial_head`).
            coordinator: whose waits are filled.
            fleet: whose engines get the head; the driver's, None elsewhere.
        """
        self._config, self._runtime, self._policy, self._fleet = config, runtime, policy, fleet
        settings = config.drafter
        self.head = head
        self.live = LiveHead(head)
        self.store = FeatureStore(settings.memory_mb * 2**20, settings.tokens_per_slice, config.train.seed)
        options = OptimizerOptions(lr=settings.lr)
        self.trainer = DraftTrainer(head, self.store, LossOptions(steps=settings.unroll), options)
        self._runner = SliceRunner(self.trainer)
        self.guard = FillGuard()
        self._alarm = LiveAlarm()
        self._supply = FeatureSupply(policy, head, self.store) if settings.trains else None
        fill = idle_fill(self._runner)
        self._bubbles = None
        if "bubbles" in settings.fill and config.parallel.pp_size > 1:
            self._bubbles = policy.fill_bubbles(fill)
        self.tail: TailFiller | None = None
        if "tails" in settings.fill:
            begins_at = 0.0 if config.rollout.placement == "separate" else TAIL_BEGINS_AT
            self.tail = TailFiller(fill, coordinator, begins_at)
        self._tail_seconds = 0.0, 0.0
        fillers = [filler for filler in (self.tail, self._bubbles) if filler is not None]
        self.timeline = StepTimeline([filler.timeline for filler in fillers], runtime.control_group)

    def start(self) -> None:
        """Give the engines the live head and decide about filling: after construction and `restore`."""
        self._push()
        self._follow_guard()

    @contextlib.contextmanager
    def recording(self, batch: Batch, step: int) -> Iterator[None]:
        """The pass inside the block, over this step's rollouts, also feeds the drafter."""
        if self.tail is not None:
            self._tail_seconds = self.tail.end()
        if self._supply is None:
            yield
            return
        with self._supply.recording(batch, step, self._config.drafter.tokens_per_step):
            yield
        self.trainer.policy = frozen_policy(self._policy.weights, self._policy.vocab_limit)

    def finish_step(self, step: int, seconds: float, tokens: int, rollout_metrics: Mapping[str, float]) -> Metrics:
        """Train, score, publish. Returns metrics of `docs/metrics.md` on the driver.

        Args:
            step: of the run.
            seconds: how long the step took so far.
            tokens: of its sequences, to compare steps.
            rollout_metrics: what the engines measured of the drafts; the driver's count.
        """
        metrics: Metrics = {}
        if self._runtime.is_driver:
            self._alarm.observe(step, rollout_metrics, self.live.version)
        self.timeline.end(step)
        if self._config.drafter.trains:
            least = self._config.drafter.min_slices * self._config.drafter.tokens_per_slice
            self._runner.run_until(lambda: self.trainer.tokens >= least)
            metrics |= _training_metrics(self.trainer.flush())
            if step % self._config.drafter.publish_every == 0:
                metrics |= self._publish_if_better(step)
            metrics |= self._idle_metrics()
            self.guard.observe(seconds, tokens)
            self._follow_guard()
        metrics |= {"drafter/version": self.live.version, "drafter/age": step - self.live.step}
        return metrics if self._runtime.is_driver else {}

    def _publish_if_better(self, step: int) -> Metrics:
        trained, live = self._score(self.head), self._score(self.live.head)
        if not trained.reached.any():
            return {}
        decision = decide(trained.expected_length, live.expected_length)
        if decision is Decision.PUBLISH:
            self.live.publish(self.head, step)
            self._push()
        elif decision is Decision.RESTORE:
            if self._runtime.is_driver:
                log.warning(
                    f"step {step}: the trained drafter would emit {trained.expected_length:.2f} tokens per "
                    f"verification, the live one {live.expected_length:.2f}; training starts again from the live one."
                )
            self.live.restore_into(self.head)
            self.trainer.reset_optimizer()
        accepted = trained if decision is Decision.PUBLISH else live
        chances = {f"drafter/accepted_{i}": float(chance) for i, chance in enumerate(accepted.per_position, start=1)}
        return {
            "drafter/trained_length": trained.expected_length,
            "drafter/heldout_length": accepted.expected_length,
            **chances,
        }

    def _score(self, head: EagleHead) -> ExpectedAcceptance:
        assert self.trainer.policy is not None
        steps, temperature = self._config.drafter.unroll, self._config.rollout.temperature
        return score(head, self.store.held_out_rows(), self.trainer.policy, steps, temperature)

    def _push(self) -> None:
        """The one place where a head goes to the engines."""
        if self._fleet is not None:
            tensors = {name: value.detach().cpu() for name, value in head_tensors(self.live.head).items()}
            self._fleet.update_drafter(tensors, self.live.version)

    def _follow_guard(self) -> None:
        fills = self.guard.fill_next()
        self._runner.share = self.guard.share
        if self._bubbles is not None:
            self._bubbles.filling = fills
        if self.tail is not None:
            self.tail.enabled = fills
        if fills:
            self.timeline.begin()

    def _idle_metrics(self) -> Metrics:
        """Seconds of the average trainer process. A collective operation."""
        bubbles = self._bubbles.take_stats() if self._bubbles is not None else BubbleStats()
        seconds = torch.tensor([bubbles.available, bubbles.filled, *self._tail_seconds], dtype=torch.float64)
        torch.distributed.all_reduce(seconds, group=self._runtime.control_group)
        names = ("bubble_available_s", "bubble_filled_s", "tail_available_s", "tail_filled_s")
        means = (seconds / self._runtime.world_size).tolist()
        metrics = {f"drafter/{name}": value for name, value in zip(names, means, strict=True)}
        if self.guard.cost is not None:
            metrics["drafter/fill_cost"] = self.guard.cost
        return metrics

    def state(self) -> dict[str, Any]:
        """For a checkpoint; the same on all ranks, but for the guard's times. Forgets the features (see the store)."""
        self.store.forget()
        return {"trainer": self.trainer.state(), "live": self.live.state(), "guard": self.guard.state()}

    def restore(self, state: dict[str, Any]) -> bool:
        """Go on from `state()`; always True.

        Raises:
            ConfigError: when it is that of another head.
        """
        try:
            self.trainer.restore(state["trainer"])
            self.live.restore(state["live"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise ConfigError(
                f"the checkpoint's drafter is not what drafter.* asks for ({str(error).splitlines()[0]}); choose the "
                "drafter of that run again, or another run_dir."
            ) from error
        self.guard.restore(state["guard"])
        return True

    def export(self, folder: Path) -> None:
        """Write the live head in vLLM's format."""
        save_head(self.live.head, folder)


def _training_metrics(flush: Flush) -> Metrics:
    return {"drafter/loss": flush.loss, "drafter/grad_norm": flush.grad_norm, "drafter/slices": flush.slices}
