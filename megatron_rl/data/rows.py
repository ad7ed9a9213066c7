"""Rows of a data set, as dicts, from JSONL, Parquet or a `datasets` name."""

import json
import logging
from pathlib import Path
from typing import Any

from megatron_rl.config import ConfigError

log = logging.getLogger(__name__)

Row = dict[str, Any]
NAMED = 10  # so many broken records are named in a warning, the rest are counted


def read_rows(name: str, key: str, split: str) -> list[tuple[str, Row]]:
    """All rows of a set, each with its place (`file:line` or `name:row`) for messages.

    Args:
        name: a `.jsonl` or `.parquet` file, or a `datasets` name; `name:configuration`, or `name:file` with a file in
            it, when it has several.
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
    return _read_hub(name, key, split)


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
            f"{key}={name!r} is neither a .jsonl or .parquet file nor a data set that can be loaded, split {split!r} "
            f"({_first_line(error)})."
        ) from None
    return [(f"{name}:{i}", dict(row)) for i, row in enumerate(data)]


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".")
