"""Rows of a data set, as dicts, from JSONL, Parquet, a user's function or a `datasets` name."""

import json
from collections.abc import Callable, Iterable, Mapping
from decimal import Decimal
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megatron_rl.config import ConfigError
from megatron_rl.config.import_path import IMPORT_PATH, import_object
from megatron_rl.data.intake import TOO_DEEP, BrokenRecord, Intake, Row, Rows, described, first_line, printable
from megatron_rl.data.parquet import read_parquet

READ_AT_ONCE = 1000  # rows of a `datasets` set


def read_rows(name: str, split: str, intake: Intake) -> Rows:
    """All rows of a set that can be read; the intake counts them, and names the others.

    Args:
        name: a `.jsonl` or `.parquet` file; a user's function as `package.module:function` (see `is_function`); or a
            `datasets` name, `name:configuration`, or `name:file` with a file in it, when it has several.
        split: split of a `datasets` name.
        intake: of the set; its key stands in messages.

    Raises:
        ConfigError: when there is nothing to read, with the reason.
    """
    file = Path(name)
    # With a colon it may also be a file within a data set.
    if name.endswith((".jsonl", ".parquet")) and (":" not in name or file.is_file()):
        if not file.is_file():
            raise ConfigError(f"{intake.key}={name!r}: the file does not exist.")
        return _read_jsonl(file, intake) if name.endswith(".jsonl") else read_parquet(file, intake)
    if file.is_file():
        raise ConfigError(f"{intake.key}={name!r} must be a .jsonl or .parquet file.")
    return _read_function(name, intake) if is_function(name) else _read_hub(name, split, intake)


def is_function(name: str) -> bool:
    """Whether `name` is a user's `package.module:function` rather than `name:configuration` of a `datasets` set.

    A name without a dot before the colon may be either: it is a function where a module of that name can be imported.
    Names with a `/`, and folders that exist, are data sets.
    """
    module = name.partition(":")[0]
    if not IMPORT_PATH.fullmatch(name) or Path(module).exists():
        return False
    return "." in module or find_spec(module) is not None


def _read_jsonl(file: Path, intake: Intake) -> Rows:
    rows: Rows = []
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                intake.total += 1
                row = intake.attempt(where := f"{file}:{number}", _json_object, line)
                if row is not None:
                    rows.append((where, row))
    except OSError as error:
        raise ConfigError(f"{intake.key}={str(file)!r} cannot be read ({first_line(error)}).") from None
    return rows


def _json_object(line: bytes) -> Row:
    try:
        # A byte order mark is at the start of a file, or in the middle of one put together from several.
        text = line.decode().removeprefix("\ufeff")
        row = json.loads(text, object_pairs_hook=_without_duplicates, parse_int=_integer, parse_float=_number)
    except UnicodeDecodeError:
        raise BrokenRecord("not UTF-8 text") from None
    except RecursionError:
        raise BrokenRecord(TOO_DEEP) from None
    except json.JSONDecodeError as error:
        raise BrokenRecord("not a JSON object", first_line(error)) from None
    if not isinstance(row, dict):
        raise BrokenRecord("not a JSON object")
    return row


def _without_duplicates(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise BrokenRecord("the same key twice in a JSON object")
    return row


def _integer(text: str) -> int | Decimal:
    try:
        return int(text)
    except ValueError:  # Python reads no int of more than 4300 digits
        return Decimal(text)


def _number(text: str) -> float | Decimal:
    """A float, or a Decimal where a float would be another number."""
    value, exact = float(text), Decimal(text)
    return value if Decimal(repr(value)) == exact else exact


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


def _read_function(name: str, intake: Intake) -> Rows:
    """The records of a user's function: called without arguments, it returns or yields mappings, finitely many.

    A run that is resumed, and every trainer process of `sft`, calls it again and relies on the same records in the same
    order.
    """
    function = find_function(name, intake.key)
    rows: Rows = []
    for index, record in enumerate(_call(function, name, intake.key)):
        intake.total += 1
        row = intake.attempt(where := f"{name}:{index}", _row_of_mapping, record)
        if row is not None:
            rows.append((where, row))
    return rows


def _row_of_mapping(record: Any) -> Row:
    if not isinstance(record, Mapping):
        raise BrokenRecord("not a dict", printable(repr(record)))
    return {str(column): value for column, value in record.items()}


def _call(function: Callable[[], Iterable[Any]], name: str, key: str) -> list[Any]:
    records: list[Any] = []
    try:
        for record in function():
            records.append(record)
    except Exception as error:
        raise ConfigError(
            f"{key}={name!r} failed after {len(records)} records with {type(error).__name__}: {first_line(error)}."
        ) from error
    return records


def _read_hub(name: str, split: str, intake: Intake) -> Rows:
    import datasets

    repository, _, part = name.partition(":")
    try:
        if part.endswith((".jsonl", ".parquet")):
            data = datasets.load_dataset(repository, data_files={split: part}, split=split)
        else:
            data = datasets.load_dataset(repository, part or None, split=split)
    except Exception as error:  # of the hub, of builders, of readers of many formats
        reason = first_line(error) if isinstance(error, OSError | ValueError) else described(error)
        raise ConfigError(
            f"{intake.key}={name!r} is neither a .jsonl or .parquet file, nor a function package.module:function, nor "
            f"a data set that can be loaded, split {split!r} ({reason})."
        ) from None
    rows: Rows = []
    for start in range(0, len(data), READ_AT_ONCE):
        chosen = range(start, min(start + READ_AT_ONCE, len(data)))
        intake.total += len(chosen)
        block: list[Row | None] = _block(data, chosen) or [
            intake.attempt(f"{name}:{i}", data.__getitem__, i) for i in chosen
        ]
        rows += [(f"{name}:{i}", row) for i, row in zip(chosen, block, strict=True) if row is not None]
    return rows


def _block(data: Any, chosen: range) -> list[Row | None]:
    """Many rows at a time, which is faster than one by one; none when one of them cannot be decoded."""
    try:
        columns = data[chosen.start : chosen.stop]
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    except Exception:  # each row is tried alone then
        return []
