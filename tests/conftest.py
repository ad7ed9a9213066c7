"""How the tests share the cores, and their order: pytest runs files as they come, one worker each."""

import os

import pytest

# Threads of one test that wait for each other spin, and take the cores from the other tests. Before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# The readline of pytest's debugger leaves one to the workers of xdist, and tables would be cut to its 80 columns.
os.environ.pop("COLUMNS", None)

LONG = (
    "tests/runs/test_train.py",
    *(f"tests/{room}/" for room in ("runs", "trainer", "models", "drafting", "generation", "cluster", "rollout")),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first, so that no worker is left with them at the end."""
    items.sort(key=lambda item: next((i for i, start in enumerate(LONG) if item.nodeid.startswith(start)), len(LONG)))
