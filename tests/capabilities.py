"""The instruction sets that native operators choose from or need, and what this machine has of them."""

from collections.abc import Callable

import pytest
import torch

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


def require_int8() -> None:
    """Skip what calls it, a test or a fixture, on a CPU whose int8 products would be refused (see `check_device`)."""
    if not torch.cpu._is_vnni_supported():
        pytest.skip("int8 products need AVX-512 VNNI")
