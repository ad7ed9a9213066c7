"""The run's end of a reward's process, and the environment that the process gets."""

import contextlib
import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_rl.rewards.supervisor import REPLY, REQUEST, START_TIMEOUT_S

CODE = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[3]); "
    "from megatron_rl.rewards.supervisor import main; main(sys.argv[1], int(sys.argv[2]))"
)
ANSWERS_WITHIN_S = 30.0
"""The supervisor keeps the time limits; one that is later than this by so much is stuck or starved."""
PASSED_ON = frozenset(
    ("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "TZ", "TMPDIR", "VIRTUAL_ENV", "CONDA_PREFIX")
    + ("PYTHONPATH", "PYTHONHOME", "PYTHONHASHSEED", "PYTHONDONTWRITEBYTECODE", "PYTHONUNBUFFERED", "PYTHONUTF8")
    + ("LD_LIBRARY_PATH", "CUDA_HOME", "CUDA_VISIBLE_DEVICES", "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE")
    + ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "TORCH_HOME", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE")
    + ("HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
)
"""Variables that a reward sees, beside `LC_*` and those of `reward.environment`; tokens, and what launchers, Ray and
engines set, are not among them."""


class WorkerError(Exception):
    """The reward failed, or its process ended."""


class NotANumber(WorkerError):
    """The reward returned something that is not a number."""


def visible_environment(environment: Mapping[str, str], names: Sequence[str]) -> dict[str, str]:
    """What a reward sees of `environment`: the harmless variables, and those of `names`."""
    seen = {name: value for name, value in environment.items() if name in PASSED_ON or name.startswith("LC_")}
    # Rewards must not compete with the trainer's threads.
    seen["OMP_NUM_THREADS"] = "1"
    return seen | {name: environment[name] for name in names if name in environment}


def hidden_variables(environment: Mapping[str, str], names: Sequence[str]) -> list[str]:
    """The variables of `environment` that a reward does not see."""
    return sorted(environment.keys() - visible_environment(environment, names).keys())


class ScoreWorker:
    """One process that scores, started when first needed and again after it ended.

    Args:
        name: a built-in reward or a user's `package.module:function`.
        environment: names of further variables that it sees.
    """

    def __init__(self, name: str, environment: Sequence[str] = ()) -> None:
        self._name, self._environment = name, environment
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the process and wait until it has imported the reward.

        Raises:
            WorkerError: when it cannot.
        """
        path = json.dumps([entry or os.getcwd() for entry in sys.path])
        self._process = subprocess.Popen(
            [sys.executable, "-c", CODE, self._name, str(os.getpid()), path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=visible_environment(os.environ, self._environment),
            # What kills the run's process group leaves it a moment to clean up.
            start_new_session=True,
        )
        try:
            ready = self._reply(START_TIMEOUT_S + ANSWERS_WITHIN_S)
        except TimeoutError:
            ready = {"error": "its process does not answer"}
        if "error" in ready:
            self.stop()
            raise WorkerError(ready["error"])

    def ask(self, prompt: str, response: str, answer: str, timeout_s: float) -> dict[str, Any]:
        """Score one response.

        Returns:
            The `value`, and with a built-in reward the `reading` (`scoring_process.serve`).

        Raises:
            TimeoutError: no result in time.
            NotANumber: the reward returned something else.
            WorkerError: the reward raised or its process ended.
        """
        if self._process is None or self._process.poll() is not None:
            self.stop()
            self.start()
        assert self._process is not None and self._process.stdin is not None
        message = json.dumps({"prompt": prompt, "response": response, "answer": answer}).encode()
        try:
            self._process.stdin.write(REQUEST.pack(len(message), timeout_s) + message)
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None
        try:
            # A process that was replaced imports the reward first.
            reply = self._reply(timeout_s + START_TIMEOUT_S + ANSWERS_WITHIN_S)
        except TimeoutError:
            self.stop()
            raise
        if reply.get("timed_out"):
            raise TimeoutError
        if "error" in reply:
            raise (NotANumber if reply.get("not_a_number") else WorkerError)(reply["error"])
        return reply

    def stop(self) -> None:
        """End the process and all that the reward has started."""
        if self._process is None:
            return
        assert self._process.stdout is not None and self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # an unread message was still buffered
            self._process.stdin.close()
        try:
            self._process.wait(ANSWERS_WITHIN_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._process = None

    def _reply(self, timeout_s: float) -> dict[str, Any]:
        deadline = time.monotonic() + timeout_s
        (length,) = REPLY.unpack(self._read(REPLY.size, deadline))
        reply: dict[str, Any] = json.loads(self._read(length, deadline))
        return reply

    def _read(self, length: int, deadline: float) -> bytes:
        assert self._process is not None and self._process.stdout is not None
        pipe = self._process.stdout.fileno()
        received = b""
        with selectors.PollSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            while len(received) < length:
                if not selector.select(max(deadline - time.monotonic(), 0)):
                    raise TimeoutError
                part = os.read(pipe, length - len(received))
                if not part:
                    raise self._ended()
                received += part
        return received

    def _ended(self) -> WorkerError:
        assert self._process is not None
        return WorkerError(f"its process ended with exit code {self._process.wait()}")
