"""Scoring of responses, safe against rewards that raise, hang or crash."""

import contextlib
import json
import logging
import os
import queue
import selectors
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from megatron_rl.config import ConfigError
from megatron_rl.config.sections import RewardConfig
from megatron_rl.rewards.builtin import BUILTIN, INLINE, length_penalty
from megatron_rl.rewards.scoring_process import describe, evaluate

log = logging.getLogger(__name__)

START_TIMEOUT_S = 120.0
"""Importing a user's module may take long (torch, a reward model); it does not count as scoring time."""

WORKER_CODE = "import sys; from megatron_rl.rewards.scoring_process import main; main(sys.argv[1])"


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

    @property
    def total(self) -> float:
        """The reward to learn from."""
        return self.value + self.penalty


class Scorer:
    """Scores responses by the `reward` section. Not for use from several threads at once; close it at the end.

    `exact`, `numeric` and `choice` run here; everything else in worker processes, which a hanging reward cannot
    outlive: after `reward.timeout_s` the worker is killed and replaced.

    Args:
        reward: the section `reward`.
        max_tokens: longest response, at which `reward.length_penalty` is largest.
        workers: worker processes; None: one per core.

    Raises:
        ConfigError: when `reward.function` cannot be used.
    """

    def __init__(self, reward: RewardConfig, max_tokens: int, workers: int | None = None) -> None:
        self._reward = reward
        self._max_tokens = max_tokens
        self._errors = self._timeouts = 0
        self._name = reward.function or reward.name
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._workers: list[_Worker] = []
        self._threads: ThreadPoolExecutor | None = None
        if reward.function is None and reward.name in INLINE:
            return
        count = workers or len(os.sched_getaffinity(0))
        self._workers = [_Worker(self._name) for _ in range(count)]
        try:
            self._workers[0].start()
        except _WorkerError as error:
            key = "reward.function" if reward.function else "reward.name"
            raise ConfigError(f"{key}={self._name!r} cannot be used: {str(error).rstrip('.')}.") from None
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
        if self._threads is None:
            scores = [self._score_here(item) for item in items]
        else:
            scores = list(self._threads.map(self._score_in_worker, items))
        for item, score in zip(items, scores, strict=True):
            if score.error is not None:
                log.warning("reward of record %s: %s; counted as 0", item.record_id, score.error)
        self._errors += sum(score.error is not None for score in scores)
        self._timeouts += sum(score.timed_out for score in scores)
        penalty = self._reward.length_penalty
        if penalty is None:
            return scores
        sizes = [length_penalty(item.length, penalty.start, penalty.coef, self._max_tokens) for item in items]
        return [replace(score, penalty=size) for score, size in zip(scores, sizes, strict=True)]

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
            return Score(evaluate(BUILTIN[self._name], item.prompt, item.response, item.answer))
        except Exception as error:
            return Score(0.0, describe(error))

    def _score_in_worker(self, item: ScoreItem) -> Score:
        worker = self._idle.get()
        try:
            return Score(worker.ask(item, self._reward.timeout_s))
        except TimeoutError:
            worker.stop()
            return Score(0.0, f"no result after reward.timeout_s={self._reward.timeout_s:g} seconds", timed_out=True)
        except _WorkerError as error:
            return Score(0.0, str(error))
        finally:
            self._idle.put(worker)


class _WorkerError(Exception):
    """The reward failed, or its process ended."""


class _Worker:
    """One worker process, started when first needed and again after it ended."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._process: subprocess.Popen[bytes] | None = None
        self._received = b""

    def start(self) -> None:
        """Start the process and wait until it has imported the reward."""
        # The same interpreter and import path as here; rewards must not compete with the trainer's threads.
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-c", WORKER_CODE, self._name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )
        self._received = b""
        try:
            ready = self._reply(START_TIMEOUT_S)
        except TimeoutError:
            ready = {"error": f"importing it took more than {START_TIMEOUT_S:g} seconds"}
        if "error" in ready:
            self.stop()
            raise _WorkerError(ready["error"])

    def ask(self, item: ScoreItem, timeout_s: float) -> float:
        """Score one item.

        Raises:
            TimeoutError: no reply in time; the process must be stopped.
            _WorkerError: the reward raised or its process ended.
        """
        if self._process is None or self._process.poll() is not None:
            self.stop()
            self.start()
        assert self._process is not None and self._process.stdin is not None
        message = {"prompt": item.prompt, "response": item.response, "answer": item.answer}
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None
        reply = self._reply(timeout_s)
        if "error" in reply:
            raise _WorkerError(reply["error"])
        return float(reply["value"])

    def stop(self) -> None:
        if self._process is None:
            return
        assert self._process.stdout is not None and self._process.stdin is not None
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()
        with contextlib.suppress(BrokenPipeError):  # an unread message was still buffered
            self._process.stdin.close()
        self._process = None

    def _reply(self, timeout_s: float) -> dict[str, Any]:
        assert self._process is not None and self._process.stdout is not None
        pipe = self._process.stdout.fileno()
        deadline = time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            while b"\n" not in self._received:
                if not selector.select(max(deadline - time.monotonic(), 0)):
                    raise TimeoutError
                received = os.read(pipe, 65536)
                if not received:
                    raise self._ended()
                self._received += received
        line, self._received = self._received.split(b"\n", 1)
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _ended(self) -> _WorkerError:
        assert self._process is not None
        return _WorkerError(f"its process ended with exit code {self._process.wait()}")
