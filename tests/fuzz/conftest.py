"""How many cases are tried: fifty of each kind, always the same, or as many as `make fuzz` says, always others."""

import logging
import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))

settings.register_profile(
    "records",
    max_examples=EXAMPLES or 50,
    derandomize=EXAMPLES == 0,
    database=None,
    deadline=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
settings.load_profile("records")


@pytest.fixture(autouse=True, scope="module")
def quiet() -> Iterator[None]:
    """Thousands of warnings would hide the one case that failed."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)
