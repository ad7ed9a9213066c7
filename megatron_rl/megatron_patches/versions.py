"""The versions of megatron-core whose inner workings this package relies on."""

import megatron.core

TESTED = ("0.16.",)


def check(what: str) -> None:
    """Refuse an untested megatron-core. `what` is the part that depends on the version, as the error names it.

    Raises:
        RuntimeError: naming the version and the remedy.
    """
    if not megatron.core.__version__.startswith(TESTED):
        raise RuntimeError(
            f"{what} was not tested with megatron-core {megatron.core.__version__}; install a version that starts with "
            f"{' or '.join(TESTED)}."
        )
