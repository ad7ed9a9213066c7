"""Rows of a Parquet file. A value that cannot be converted spoils its record only where it is used."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_rl.config import ConfigError
from megatron_rl.data.intake import Intake, Rows, described, first_line
from megatron_rl.data.values import Unreadable

if TYPE_CHECKING:
    import pyarrow

READ_AT_ONCE = 1000  # rows


def read_parquet(file: Path, intake: Intake) -> Rows:
    """All rows of a Parquet file, counted in the intake.

    Raises:
        ConfigError: when it is no Parquet file.
    """
    import pyarrow.parquet

    try:
        # Not read_table: it adds columns that names of folders suggest, and takes no column twice.
        table = pyarrow.parquet.ParquetFile(file).read()
    except Exception as error:  # of a damaged file, whatever its bytes mean
        raise ConfigError(f"{intake.key}={str(file)!r} is not a readable Parquet file ({first_line(error)}).") from None
    intake.total += table.num_rows
    twice = {name for name, count in Counter(table.column_names).items() if count > 1}
    rows: Rows = []
    for batch in table.to_batches(max_chunksize=READ_AT_ONCE):
        columns = {
            name: [Unreadable(f"two columns are called {name}")] * batch.num_rows if name in twice else _values(column)
            for name, column in zip(table.column_names, batch.columns, strict=True)
        }
        for row in zip(*columns.values(), strict=True):
            rows.append((f"{file}:{len(rows)}", dict(zip(columns, row, strict=True))))
    return rows


def _values(column: "pyarrow.Array") -> list[Any]:
    """A column's values as Python's; of floats of 16 or 32 bits, the digits that were meant: 0.1, not 0.10000000149."""
    import pyarrow

    def convert(values: "pyarrow.Array") -> list[Any]:
        found = values.to_pylist(maps_as_pydicts="strict")
        narrow = {pyarrow.float16(): np.float16, pyarrow.float32(): np.float32}.get(values.type)
        return found if narrow is None else [None if each is None else float(str(narrow(each))) for each in found]

    try:
        return convert(column)
    except Exception:
        return [_value(convert, column.slice(place, 1)) for place in range(len(column))]


def _value(convert: Callable[["pyarrow.Array"], list[Any]], cell: "pyarrow.Array") -> Any:
    try:
        return convert(cell)[0]
    except Exception as error:  # text that is not UTF-8, a date beyond year 9999, a struct with a field twice, ...
        return Unreadable(described(error))
