"""The order of the tests: pytest runs files as they come, one worker each."""

import pytest

LONG = ("tests/training/test_train.py", "tests/training/", "tests/rollout/")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first, so that no worker is left with them at the end."""
    items.sort(key=lambda item: next((i for i, start in enumerate(LONG) if item.nodeid.startswith(start)), len(LONG)))
