"""A worker process that scores one response at a time.

One JSON object per line in (`prompt`, `response`, `answer`) and out (`value` or `error`); the first line out is `{}`,
or the reason why the reward cannot be used. A plain subprocess rather than multiprocessing, whose children import the
parent's main module, and torch with it.
"""

import importlib
import json
import math
import os
import sys
from collections.abc import Callable
from typing import Any

from megatron_rl.rewards.builtin import BUILTIN


def evaluate(reward: Callable[[str, str, str], Any], prompt: str, response: str, answer: str) -> float:
    """The reward as a finite float.

    Args:
        reward: a built-in reward or a user's function (`megatron_rl.rewards`).
        prompt: what the model was given.
        response: what it wrote.
        answer: the record's reference answer.

    Raises:
        TypeError: when it is not a number.
        ValueError: when it is NaN or infinite.
    """
    raw = reward(prompt, response, answer)
    if isinstance(raw, str | bytes) or not hasattr(raw, "__float__"):
        raise TypeError(f"the reward returned {raw!r}, not a number")
    value = float(raw)
    if not math.isfinite(value):
        raise ValueError(f"the reward returned {value}")
    return value


def resolve(name: str) -> Callable[[str, str, str], Any]:
    """The reward that `name` stands for, imported and ready to be called.

    Args:
        name: a built-in reward, or a user's `package.module:function`.

    Raises:
        ValueError: with the reason, when there is no such function.
    """
    if name in BUILTIN:
        BUILTIN[name]("", "1", "1")  # what it imports on the first call must not count as scoring time
        return BUILTIN[name]
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise ValueError("it must have the form package.module:function")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ValueError(f"importing {module_name} failed with {describe(error)}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"{module_name} has no function {function_name}")
    return function  # type: ignore[no-any-return]


def describe(error: BaseException) -> str:
    """Type and message of an exception on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def main(name: str) -> None:
    """Serve the built-in reward or `package.module:function` called `name` until the input ends."""
    _die_with_parent()
    # What the reward prints must not end up among the replies.
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    try:
        reward = resolve(name)
    except ValueError as error:
        print(json.dumps({"error": str(error)}), file=replies)
        return
    print("{}", file=replies)
    for line in sys.stdin:
        item = json.loads(line)
        try:
            reply: dict[str, Any] = {"value": evaluate(reward, item["prompt"], item["response"], item["answer"])}
        except Exception as error:
            reply = {"error": describe(error)}
        print(json.dumps(reply), file=replies)


def _die_with_parent() -> None:
    """A hanging reward would not notice that the run was killed (Linux only; elsewhere the pipe ends idle workers)."""
    if sys.platform == "linux":
        import ctypes
        import signal

        parent_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(parent_death_signal, int(signal.SIGKILL))
