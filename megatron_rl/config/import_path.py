"""What a setting like `package.module:name` names: an object of a user's own module."""

import importlib
import re
from typing import Any

IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def import_object(path: str) -> Any:
    """The object `name` of `package.module`; None when the module has no such name.

    Args:
        path: `package.module:name`. The module is found as for any import: the folder in which the command was started
            comes first, then `PYTHONPATH`, then what is installed.

    Raises:
        ValueError: when the module cannot be imported, with the reason on one line.
    """
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name, None)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(".")
        raise ValueError(f"importing {module} failed with {reason}") from error
