"""The instruction sets that native operators choose from, for tests that go through all of this machine's."""

from collections.abc import Callable

import pytest

CAPABILITY = "MEGATRON_RL_CPU_CAPABILITY"


def available(probe: Callable[[], object]) -> list[str]:
    """The capabilities with which `probe`, a call of a native operator, raises no ValueError."""
    found = []
    for name in ("avx512", "avx2", "portable"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(CAPABILITY, name)
            try:
                probe()
            except ValueError:
                continue
        found.append(name)
    return found
