"""Scoring of responses, safe against rewards that raise, hang or crash."""

import logging
import os
import queue
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from megatron_rl.config import ConfigError
from megatron_rl.config.sections import RewardConfig
from megatron_rl.rewards.builtin import INLINE, JUDGES, length_penalty
from megatron_rl.rewards.judgement import Judgement
from megatron_rl.rewards.score_worker import NotANumber, ScoreWorker, WorkerError, hidden_variables
from megatron_rl.rewards.scoring_process import describe

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScoreItem:
    """One response to score."""

    prompt: str
    response: str
    answer: str
    length: int  # tokens of the response
    record_id: str  # named in the log when scoring fails


@dataclass(frozen=True)
class Score:
    """The score of one response; `error` says why scoring failed, and then `value` is 0."""

    value: float
    """Of the reward itself."""
    error: str | None = None
    timed_out: bool = False
    penalty: float = 0.0
    """For the length, <= 0."""
    reading: Judgement | None = None
    """How a built-in reward read the texts."""
    not_a_number: bool = False
    """Whether the error is that a user's function returned something else than a number."""

    @property
    def total(self) -> float:
        """The reward to learn from."""
        return self.value + self.penalty


class Scorer:
    """Scores responses by the `reward` section. Not for use from several threads at once; close it at the end.

    `exact`, `numeric` and `choice` run here; everything else in worker processes, which a hanging reward cannot
    outlive: after `reward.timeout_s` the process is killed, with all that it has started, and replaced.

    Args:
        reward: the section `reward`.
        max_tokens: longest response, at which `reward.length_penalty` is largest.
        workers: worker processes; None: one per core.

    Raises:
        ConfigError: when `reward.function` cannot be used.
    """

    def __init__(self, reward: RewardConfig, max_tokens: int, workers: int | None = None) -> None:
        self.reward = reward
        self._max_tokens = max_tokens
        self._errors = self._timeouts = 0
        self._name = reward.function or reward.name
        self._idle: queue.SimpleQueue[ScoreWorker] = queue.SimpleQueue()
        self._workers: list[ScoreWorker] = []
        self._threads: ThreadPoolExecutor | None = None
        if reward.function is None and reward.name in INLINE:
            return
        count = workers or len(os.sched_getaffinity(0))
        self._workers = [ScoreWorker(self._name, reward.environment) for _ in range(count)]
        try:
            self._workers[0].start()
        except WorkerError as error:
            key = "reward.function" if reward.function else "reward.name"
            hidden = "".join(
                f" It does not see the environment variable {name}; to show it, list it in reward.environment."
                for name in hidden_variables(os.environ, reward.environment)
                if name in str(error)
            )
            raise ConfigError(f"{key}={self._name!r} cannot be used: {str(error).rstrip('.')}.{hidden}") from None
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="scorer")

    def __enter__(self) -> "Scorer":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def score(self, items: Sequence[ScoreItem]) -> list[Score]:
        """Scores in the order of `items`. A reward that raises, hangs, crashes or returns no finite number counts 0
        and is logged with its record id."""
        scores = self.attempt(items)
        for item, score in zip(items, scores, strict=True):
            if score.error is not None:
                log.warning("reward of record %s: %s; counted as 0", item.record_id, score.error)
        self._errors += sum(score.error is not None for score in scores)
        self._timeouts += sum(score.timed_out for score in scores)
        penalty = self.reward.length_penalty
        if penalty is None:
            return scores
        sizes = [length_penalty(item.length, penalty.start, penalty.coef, self._max_tokens) for item in items]
        return [replace(score, penalty=size) for score, size in zip(scores, sizes, strict=True)]

    def attempt(self, items: Sequence[ScoreItem]) -> list[Score]:
        """Like `score`, but nothing is logged or counted, and lengths do not matter."""
        if self._threads is None:
            return [self._score_here(item) for item in items]
        return list(self._threads.map(self._score_in_worker, items))

    def metrics(self) -> dict[str, float]:
        """`errors` (timeouts included) and `timeouts` since the last call."""
        counts = {"errors": float(self._errors), "timeouts": float(self._timeouts)}
        self._errors = self._timeouts = 0
        return counts

    def close(self) -> None:
        """End the worker processes."""
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.stop()

    def _score_here(self, item: ScoreItem) -> Score:
        try:
            judgement = JUDGES[self._name](item.response, item.answer)
        except Exception as error:
            return Score(0.0, describe(error))
        return Score(judgement.score, reading=judgement)

    def _score_in_worker(self, item: ScoreItem) -> Score:
        worker, timeout_s = self._idle.get(), self.reward.timeout_s
        try:
            reply = worker.ask(item.prompt, item.response, item.answer, timeout_s)
        except TimeoutError:
            return Score(0.0, f"no result after reward.timeout_s={timeout_s:g} seconds", timed_out=True)
        except WorkerError as error:
            return Score(0.0, str(error), not_a_number=isinstance(error, NotANumber))
        finally:
            self._idle.put(worker)
        value = float(reply["value"])
        return Score(value, reading=Judgement(value, *reply["reading"]) if "reading" in reply else None)
