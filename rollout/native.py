"""Libraries of torch operators that are built from csrc."""

from functools import cache
from pathlib import Path

import torch

_REMEDY = "run `make setup`, or `pip install --no-build-isolation -e .` in your own environment"


@cache
def load_operators(library: Path) -> None:
    """Register the operators of a library, once.

    Raises:
        ImportError: when it has not been built, or was built for another torch; the message says what to do.
    """
    name = "/".join(library.parts[-3:])
    if not library.is_file():
        raise ImportError(f"The native library {name} has not been built: {_REMEDY}.")
    try:
        torch.ops.load_library(library)
    except OSError as error:
        raise ImportError(f"{name} does not fit torch {torch.__version__} ({error}); {_REMEDY}.") from error
