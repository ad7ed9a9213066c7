"""The versions of megatron-core that this package works with, and how a patch says which of them it is for.

    @patch("<0.17")
    def write_in_threads() -> None:
        '''What it changes, and why.'''

Calling such a function changes megatron-core where the installed version is one of these, and nothing elsewhere.
"""

from collections.abc import Callable
from functools import wraps

from packaging.specifiers import SpecifierSet
from packaging.version import Version

SUPPORTED = SpecifierSet(">=0.16.1,<0.20")
TESTED = ("0.16.1", "0.17.1", "0.18.2", "0.19.2")
"""What the trainer's tests were run on: the last release of each minor version."""


def installed() -> str:
    """The version of megatron-core that Python finds."""
    import megatron.core

    # Without the commit that some releases add where they are imported inside a git repository.
    return Version(megatron.core.__version__).public


def check(what: str) -> None:
    """Refuse a megatron-core that is not supported.

    Args:
        what: the part that depends on the version, as the error names it.

    Raises:
        RuntimeError: naming the version and the remedy.
    """
    version = installed()
    if version not in SUPPORTED:
        raise RuntimeError(
            f"{what} was not tested with megatron-core {version}; install one of {SUPPORTED}, best {TESTED[-1]} (Python "
            f"3.12 and later) or {TESTED[0]}."
        )


def patch(versions: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Mark a function that changes megatron-core: it does so for `versions` alone.

    Args:
        versions: a specifier such as "<0.17", within those supported.
    """
    meant = SpecifierSet(versions)

    def decorate(change: Callable[[], None]) -> Callable[[], None]:
        @wraps(change)
        def change_if_meant() -> None:
            check(f"the patch {change.__name__}")
            if installed() in meant:
                change()

        return change_if_meant

    return decorate
