"""A data source of its own: a table in a layout that only this project knows.

`products.csv` has one product per line: `number`, `doublings` (the factor is 2 to this power) and `split`.
"""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("products.csv")
DIGITS = 5  # the demo's base model has learned numbers of this width


def train() -> Iterator[dict[str, Any]]:
    """Records for `data.train`."""
    return _records("train")


def heldout() -> Iterator[dict[str, Any]]:
    """Records for `data.eval`."""
    return _records("heldout")


def _records(split: str) -> Iterator[dict[str, Any]]:
    """The rows of a split, as prompts for the demo's model: `00437*08?`."""
    with TABLE.open(newline="", encoding="utf-8") as table:
        for line, row in enumerate(csv.DictReader(table), 2):
            if row["split"] != split:
                continue
            number, factor = int(row["number"]), 2 ** int(row["doublings"])
            yield {
                "id": f"products/{line}",
                "prompt": f"{number:0{DIGITS}d}*{factor:02d}?",
                "answer": number * factor,
            }
