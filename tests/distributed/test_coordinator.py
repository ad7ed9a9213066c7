"""The driver's work, and how the other ranks wait for it."""

from types import SimpleNamespace
from typing import Any

import pytest

from megatron_rl.distributed.coordinator import Coordinator


class OtherRank(Coordinator):
    """A rank that hears `messages` of the driver, one after the other."""

    def __init__(self, messages: list[tuple[str, Any]]) -> None:
        super().__init__(SimpleNamespace(is_driver=False))  # type: ignore[arg-type]
        self._messages = iter(messages)

    def _exchange(self, message: Any) -> Any:
        assert message is None
        return next(self._messages)


def test_another_rank_takes_part_in_actions_until_the_result_comes() -> None:
    rank = OtherRank([("call", "greet"), ("call", "greet"), ("result", 7)])
    greetings: list[str] = []
    rank.register("greet", lambda: greetings.append("hello"))
    assert rank.drive(lambda: pytest.fail("work is the driver's")) == 7
    assert greetings == ["hello", "hello"]


def test_waits_can_be_filled_by_one_part_alone() -> None:
    rank = OtherRank([("result", 7)])
    filled: list[str] = []

    def wait(operation: Any) -> Any:
        filled.append("a slice")
        return operation()

    rank.fill_waits(wait)
    assert rank.drive(lambda: None) == 7
    assert filled == ["a slice"]
    with pytest.raises(RuntimeError, match="filled already"):
        rank.fill_waits(wait)
