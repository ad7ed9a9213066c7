"""The versions of megatron-core that this package works with, and how a patch says which of them it is for.

    @patch("<0.17")
    def write_in_threads() -> None:
        '''What it changes, and why.'''

Calling such a function changes megatron-core where the installed version is one of these, and nothing elsewhere.
"""

from collections.abc import Callable
from functools import wraps
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from packaging.specifiers import SpecifierSet

from megatron_rl.config.errors import ConfigError

NAME = "megatron-core"
SUPPORTED = SpecifierSet(">=0.16.1,<0.20")
TESTED = ("0.16.1", "0.17.1", "0.18.2", "0.19.2")
"""What the trainer's tests were run on: the last release of each minor version."""
IMPORTS_TRITON = SpecifierSet(">=0.18")
"""Versions that cannot be imported without triton, which only CUDA builds of torch bring."""


def installed() -> str | None:
    """The version that is installed, or None."""
    try:
        return version(NAME)
    except PackageNotFoundError:
        return None


def fault(found: str | None) -> str | None:
    """Why no run can stand on this version, and the remedy; None when one can.

    Args:
        found: a version of megatron-core, or None where there is none.
    """
    if found is None:
        return f"it is not installed: pip install '{NAME}{SUPPORTED}'"
    if found not in SUPPORTED:
        return f"it is not among the versions supported: pip install '{NAME}{SUPPORTED}'"
    if found in IMPORTS_TRITON and find_spec("triton") is None:
        return "it needs triton, also on a CPU: pip install triton"
    return None


def check() -> str:
    """Refuse a megatron-core that no run can stand on.

    Returns:
        The version that is installed.

    Raises:
        ConfigError: naming the version and the remedy.
    """
    found = installed()
    if reason := fault(found):
        raise ConfigError(f"{NAME} {found or ''}".rstrip() + f" cannot be used, because {reason}")
    return str(found)


def patch(versions: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Mark a function that changes megatron-core: it does so for `versions` alone, and refuses any that is unknown.

    Args:
        versions: a specifier such as "<0.17", within those supported.
    """
    meant = SpecifierSet(versions)

    def decorate(change: Callable[[], None]) -> Callable[[], None]:
        @wraps(change)
        def change_if_meant() -> None:
            if check() in meant:
                change()

        return change_if_meant

    return decorate
