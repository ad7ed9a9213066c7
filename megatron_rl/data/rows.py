"""Rows of a data set, as dicts, from JSONL, Parquet, a user's function or a `datasets` name."""

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megatron_rl.config import ConfigError
from megatron_rl.config.import_path import IMPORT_PATH, import_object

log = logging.getLogger(__name__)

Row = dict[str, Any]
NAMED = 10  # so many broken records are named in a warning, the rest are counted


def read_rows(name: str, key: str, split: str) -> list[tuple[str, Row]]:
    """All rows of a set, each with its place (`file:line` or `name:row`) for messages.

    Args:
        name: a `.jsonl` or `.parquet` file; a user's function as `package.module:function` (see `is_function`); or a
            `datasets` name, `name:configuration`, or `name:file` with a file in it, when it has several.
        key: the config key that holds `name`, for messages.
        split: split of a `datasets` name.

    Raises:
        ConfigError: when there is nothing to read, with the reason.
    """
    file = Path(name)
    # With a colon it may also be a file within a data set.
    if name.endswith((".jsonl", ".parquet")) and (":" not in name or file.is_file()):
        if not file.is_file():
            raise ConfigError(f"{key}={name!r}: the file does not exist.")
        return _read_jsonl(file, key) if name.endswith(".jsonl") else _read_parquet(file, key)
    if Path(name).is_file():
        raise ConfigError(f"{key}={name!r} must be a .jsonl or .parquet file.")
    return _read_function(name, key) if is_function(name) else _read_hub(name, key, split)


def is_function(name: str) -> bool:
    """Whether `name` is a user's `package.module:function` rather than `name:configuration` of a `datasets` set.

    A name without a dot before the colon may be either: it is a function where a module of that name can be imported.
    Names with a `/`, and folders that exist, are data sets.
    """
    module = name.partition(":")[0]
    if not IMPORT_PATH.fullmatch(name) or Path(module).exists():
        return False
    return "." in module or find_spec(module) is not None


def warn_broken(where: list[str], total: int, problem: str) -> None:
    """Log one warning that counts and names the records left out."""
    if where:
        more = f" and {len(where) - NAMED} more" if len(where) > NAMED else ""
        log.warning("%d of %d records left out (%s): %s%s", len(where), total, problem, ", ".join(where[:NAMED]), more)


def _read_jsonl(file: Path, key: str) -> list[tuple[str, Row]]:
    rows: list[tuple[str, Row]] = []
    broken: list[str] = []
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if isinstance(row, dict):
                rows.append((f"{file}:{number}", row))
            else:
                broken.append(f"{file}:{number}")
    if broken and not rows:
        raise ConfigError(f"{key}={str(file)!r}: no line is a JSON object (the first is {broken[0]}).")
    warn_broken(broken, len(rows) + len(broken), "not a JSON object")
    return rows


def _read_parquet(file: Path, key: str) -> list[tuple[str, Row]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise ConfigError(f"{key}={str(file)!r} is not a readable Parquet file ({_first_line(error)}).") from None
    return [(f"{file}:{i}", row) for i, row in enumerate(table.to_pylist())]


def find_function(name: str, key: str) -> Callable[[], Iterable[Any]]:
    """The user's function `name`, not yet called.

    Args:
        name: `package.module:function`.
        key: the config key that holds `name`, for messages.

    Raises:
        ConfigError: when its module cannot be imported or has no such function.
    """
    try:
        function = import_object(name)
    except ValueError as error:
        raise ConfigError(f"{key}={name!r}: {error}.") from None
    if not callable(function):
        module, _, attribute = name.partition(":")
        raise ConfigError(f"{key}={name!r}: {module} has no function {attribute}.")
    return function  # type: ignore[no-any-return]


def _read_function(name: str, key: str) -> list[tuple[str, Row]]:
    """The records of a user's function: called without arguments, it returns or yields mappings, finitely many.

    A run that is resumed, and every trainer process of `sft`, calls it again and relies on the same records in the same
    order.
    """
    function = find_function(name, key)
    rows: list[tuple[str, Row]] = []
    broken: list[str] = []
    records = _call(function, name, key)
    for index, record in enumerate(records):
        if isinstance(record, Mapping):
            rows.append((f"{name}:{index}", dict(record)))
        else:
            broken.append(f"{name}:{index}")
    if broken and not rows:
        raise ConfigError(f"{key}={name!r}: no record is a dict (the first is {records[0]!r:.60}).")
    warn_broken(broken, len(records), "not a dict")
    return rows


def _call(function: Callable[[], Iterable[Any]], name: str, key: str) -> list[Any]:
    records: list[Any] = []
    try:
        for record in function():
            records.append(record)
    except Exception as error:
        raise ConfigError(
            f"{key}={name!r} failed after {len(records)} records with {type(error).__name__}: {_first_line(error)}."
        ) from error
    return records


def _read_hub(name: str, key: str, split: str) -> list[tuple[str, Row]]:
    import datasets

    repository, _, part = name.partition(":")
    try:
        if part.endswith((".jsonl", ".parquet")):
            data = datasets.load_dataset(repository, data_files={split: part}, split=split)
        else:
            data = datasets.load_dataset(repository, part or None, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ConfigError(
            f"{key}={name!r} is neither a .jsonl or .parquet file, nor a function package.module:function, nor a data "
            f"set that can be loaded, split {split!r} ({_first_line(error)})."
        ) from None
    return [(f"{name}:{i}", dict(row)) for i, row in enumerate(data)]


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".")
