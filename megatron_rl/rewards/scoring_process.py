"""The process that runs a reward, a fork of `megatron_rl.rewards.supervisor`. Does not import torch of itself.

User code runs here: it finds no descriptor, no pipe and no environment of ours (`megatron_rl.rewards.score_worker`),
since requests and replies go through shared memory.
"""

import _thread
import contextlib
import importlib
import inspect
import json
import math
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from megatron_rl.rewards.builtin import BUILTIN, JUDGES
from megatron_rl.rewards.descendants import (
    adopt_orphans,
    has_children,
    reap_children,
    signal_when_parent_ends,
)
from megatron_rl.rewards.mailbox import Mailbox

LONGEST_ERROR = 2000
"""Characters of an error that are passed on."""


def evaluate(reward: Callable[[str, str, str], Any], prompt: str, response: str, answer: str) -> float:
    """The reward as a finite float.

    Args:
        reward: a built-in reward or a user's function (`megatron_rl.rewards`).
        prompt: what the model was given.
        response: what it wrote.
        answer: the record's reference answer.

    Raises:
        NotANumberError: when it is not a number.
        ValueError: when it is NaN or infinite.
    """
    raw = reward(prompt, response, answer)
    value = _number(raw["score"] if isinstance(raw, Mapping) and "score" in raw else raw)
    if value is None:
        raise NotANumberError(f"the reward returned {_short(raw)}, not a number")
    if not math.isfinite(value):
        raise ValueError(f"the reward returned {value}")
    return value


class NotANumberError(TypeError):
    """A reward returned something that is not a number."""


def _number(raw: Any) -> float | None:
    if isinstance(raw, str | bytes) or not hasattr(raw, "__float__"):
        return None
    try:
        return float(raw)
    except (TypeError, ValueError, RuntimeError):  # an array or tensor of several numbers
        return None
    except OverflowError:
        return math.inf


def _short(raw: Any) -> str:
    text = " ".join(repr(raw).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def resolve(name: str) -> Callable[[str, str, str], Any]:
    """The reward that `name` stands for, imported and ready to be called.

    Args:
        name: a built-in reward, or a user's `package.module:function`.

    Raises:
        ValueError: with the reason, when there is no such function.
    """
    if name in BUILTIN:
        if name == "math":  # what it imports on the first call takes long
            BUILTIN[name]("", r"\boxed{\sqrt{4}}", "2")
        return BUILTIN[name]
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise ValueError("it must have the form package.module:function")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        raise ValueError(f"importing {module_name} failed with {describe(error)}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"{module_name} has no function {function_name}")
    try:
        inspect.signature(function).bind("", "", "")
    except TypeError:
        raise ValueError(f"{function_name} does not take (prompt, response, answer)") from None
    except ValueError:
        pass  # written in C: it does not say what it takes
    return function  # type: ignore[no-any-return]


def describe(error: BaseException) -> str:
    """Type and message of an exception on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:LONGEST_ERROR]


def serve(name: str, requests: Mailbox, replies: Mailbox, temporary: str) -> NoReturn:
    """Be the process of the reward called `name`: in a fork, until it is killed.

    Args:
        name: see `resolve`.
        requests: JSON objects with `prompt`, `response` and `answer` come in here.
        replies: JSON objects go out here. The first, once the reward is imported, is empty or has an `error`. The
            others have a `value`, or an `error` with `not_a_number` when that was it; `children`, whether the call left
            processes; `threads`, whether it left threads; and `reading`, when a built-in reward says how it read the
            texts: [reference, response, reason].
        temporary: folder for temporary files.
    """
    code = 1
    try:
        _separate(temporary)
        _serve(name, requests, replies)
    except SystemExit as error:  # of the reward: as in a process of its own
        if not isinstance(error.code, int | None):
            print(error.code, file=sys.stderr)
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code & 0xFF)


def _separate(temporary: str) -> None:
    """Nothing of the supervisor stays but the memory."""
    signal_when_parent_ends(signal.SIGKILL)
    adopt_orphans()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for descriptor in os.listdir("/proc/self/fd") if sys.platform == "linux" else map(str, range(3, 256)):
        if int(descriptor) > 2:
            with contextlib.suppress(OSError):  # the one of the listing itself is closed already
                os.close(int(descriptor))
    os.environ["TMPDIR"] = tempfile.tempdir = temporary
    # The system's killer of processes that take all memory should choose this one, not a trainer or an engine.
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def _serve(name: str, requests: Mailbox, replies: Mailbox) -> None:
    try:
        reward = resolve(name)
    except ValueError as error:
        replies.put(json.dumps({"error": str(error)}).encode())
        return
    process, folder, threads = os.getpid(), os.getcwd(), _thread._count()
    replies.put(b"{}")
    while True:
        message = requests.take()
        assert message is not None
        if has_children():
            reap_children()
        reply = _call(name, reward, json.loads(message))
        if os.getpid() != process:
            os._exit(0)  # a fork that the reward made came back from its call
        # An alarm would end this process between two calls.
        signal.setitimer(signal.ITIMER_REAL, 0)
        with contextlib.suppress(OSError):
            os.chdir(folder)
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        reply |= {"children": has_children(), "threads": _thread._count() > threads}
        replies.put(json.dumps(reply).encode())


def _call(name: str, reward: Callable[[str, str, str], Any], item: dict[str, str]) -> dict[str, Any]:
    try:
        if name in JUDGES:
            judged = JUDGES[name](item["response"], item["answer"])
            return {"value": judged.score, "reading": [judged.expected, judged.found, judged.why]}
        return {"value": evaluate(reward, item["prompt"], item["response"], item["answer"])}
    except Exception as error:
        return {"error": describe(error), "not_a_number": isinstance(error, NotANumberError)}
