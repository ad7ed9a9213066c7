"""Generation beside training: a thread of the driver keeps the fleet at work on a pool of prompts.

    step: `take` (begins to generate, waits for the step's prompts) -> training, while the thread goes on
          -> `pause` -> new weights, evaluation, checkpoint

Nothing but the thread calls `fleet.generate` between `take` and `pause`. At `pause` the engines are stopped and hand
over their unfinished responses, which continue at the next `take` under the new weights. So a token
depends on the weights of one version and all tokens before it, and keys and values of older weights play no part.
"""

import math
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

from megatron_rl.config import Config
from megatron_rl.generation.groups import Group
from megatron_rl.generation.prompt_pool import Pool, staleness_metrics
from megatron_rl.metrics import Metrics
from megatron_rl.observability.console import Console
from rollout.fleet.fleet import RolloutFleet
from rollout.types import RolloutRequest

LOOK_SECONDS = 1.0  # between looks at whether the thread has failed


class AsyncGeneration:
    """Gives each step its prompts, answered. All methods are the driver's."""

    def __init__(self, config: Config, pool: Pool, fleet: RolloutFleet, console: Console) -> None:
        self.pool = pool
        self._config, self._fleet, self._console = config, fleet, console
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="generation")
        self._generation: Future[None] | None = None
        self._stopping = threading.Event()
        self._changed = threading.Condition()  # guards the pool and the numbers below
        self._ended = 0.0
        self._tokens, self._seconds, self._engines_waited = 0, 0.0, 0.0

    def take(self, step: int) -> tuple[list[Group], Metrics]:
        """The prompts of `step` with all their responses, and metrics by the names of `docs/metrics.md`.

        With `rollout.async_steps` the engines go on; without, they are stopped.

        Raises:
            RuntimeError: what `RolloutFleet.generate` raised in the thread.
        """
        start = time.perf_counter()
        if self._generation is None:
            with self._changed:
                self.pool.open(step)
            self._stopping.clear()
            self._generation = self._thread.submit(self._generate)
        self._wait(self._generation, step)
        waited = time.perf_counter() - start
        if not self._config.rollout.async_steps:
            self.pause()
        with self._changed:
            groups = self.pool.take(step)
            metrics = self._metrics(groups, step)
        if self._config.rollout.async_steps:
            metrics["overlap/training_waited_s"] = waited
        return groups, metrics

    def _wait(self, generation: Future[None], step: int) -> None:
        """Until the pool has what `step` needs."""
        total = self._config.train.prompts_per_step * self._config.algorithm.group_size
        with self._console.phase("generating", total) as phase, self._changed:
            shown = 0
            while not self.pool.is_ready(step):
                if generation.done():
                    generation.result()
                    raise RuntimeError(f"the engines have nothing left to do, but step {step} lacks responses.")
                answered = min(self.pool.answered(step), total)
                if answered > shown:
                    phase.advance(answered - shown)
                    shown = answered
                self._changed.wait(LOOK_SECONDS)

    def pause(self) -> None:
        """Stop the engines and keep their unfinished responses. Nothing where they are stopped.

        Raises:
            RuntimeError: what `RolloutFleet.generate` raised in the thread.
        """
        if self._generation is None:
            return
        requested = time.perf_counter()
        self._stopping.set()
        self._generation.result()
        self._generation = None
        self._engines_waited += max(requested - self._ended, 0.0)

    def _generate(self) -> None:
        """The thread's work: generate until all that was requested is there, or until `pause`."""
        start = time.perf_counter()
        with self._changed:
            requests = self.pool.requests()
        for rollout in self._fleet.generate(requests, self._more):
            with self._changed:
                self._tokens += len(rollout.token_ids)
                self.pool.add(rollout)
                self._seconds += time.perf_counter() - start
                start = time.perf_counter()
                self._changed.notify()
        self._ended = time.perf_counter()

    def _more(self, idle: bool) -> list[list[RolloutRequest]] | None:
        return None if self._stopping.is_set() else []

    def _metrics(self, groups: list[Group], step: int) -> Metrics:
        """Of what was done since the last call."""
        rollouts = [group.rollouts[request.sample_index] for group in groups for request in group.requests]
        metrics = staleness_metrics(rollouts, step)
        # Nothing comes after a step during which the next one was finished too.
        speed = self._tokens / self._seconds if self._seconds else math.nan
        metrics["throughput/generated_tokens_per_s"] = speed
        if self._config.rollout.async_steps:
            metrics["overlap/engines_waited_s"] = self._engines_waited
        if self._config.rollout.partial:
            metrics["partial/unfinished"] = float(len(self.pool.unfinished))
            metrics["partial/unfinished_tokens"] = float(sum(len(r.token_ids) for r in self.pool.unfinished.values()))
        self._tokens, self._seconds, self._engines_waited = 0, 0.0, 0.0
        return metrics

    def close(self) -> None:
        """End the thread."""
        self._stopping.set()
        self._thread.shutdown()
