"""JSONL and Parquet files as editors, databases and data frames leave them."""

import datetime
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pyarrow
import pyarrow.parquet
import pytest

from megatron_rl.config import ConfigError
from megatron_rl.data.intake import Intake, Row
from megatron_rl.data.rows import read_rows
from megatron_rl.data.values import Unreadable


def intake(name: str = "set", max_left_out: float = 1.0) -> Intake:
    return Intake(name, "data.train", "data.max_left_out", max_left_out)


def jsonl(folder: Path, content: bytes) -> tuple[list[Row], Intake]:
    file = folder / "set.jsonl"
    file.write_bytes(content)
    seen = intake(str(file))
    return [row for _, row in read_rows(str(file), "train", seen)], seen


def parquet(folder: Path, table: pyarrow.Table) -> list[Row]:
    file = folder / "set.parquet"
    pyarrow.parquet.write_table(table, file)
    seen = intake(str(file))
    rows = [row for _, row in read_rows(str(file), "train", seen)]
    assert seen.total == len(rows) == table.num_rows and not seen.left_out
    return rows


def test_byte_order_marks_line_ends_of_windows_and_blank_lines_are_no_part_of_records(tmp_path: Path) -> None:
    bom = "\ufeff".encode()
    rows, seen = jsonl(tmp_path, bom + b'{"a": 1}\r\n\r\n  \n' + bom + b'{"a": "\xe2\x80\xa8"}')
    assert rows == [{"a": 1}, {"a": "\u2028"}]
    assert (seen.total, seen.left_out) == (2, [])


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "not a JSON object"),
        (b"[1]", "not a JSON object"),
        (b"null", "not a JSON object"),
        (b'{"a": 1} {"a": 2}', "not a JSON object"),
        (b'{"a": "\x00"}', "not a JSON object"),
        (b'{"a": "\xff"}', "not UTF-8 text"),
        (b'{"a": "\xed\xa0\x80"}', "not UTF-8 text"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8 text"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deeply"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": 1, "a": 2}', "the same key twice in a JSON object"),
        (b'{"b": [{"a": 1, "a": 1}]}', "the same key twice in a JSON object"),
    ],
    ids=range(12),
)
def test_a_line_that_cannot_be_read_is_left_out_with_its_reason(tmp_path: Path, line: bytes, reason: str) -> None:
    rows, seen = jsonl(tmp_path, b'{"a": 1}\n' + line + b'\n{"a": 3}\n')
    assert rows == [{"a": 1}, {"a": 3}]
    assert [(each.where.rpartition(":")[2], each.reason) for each in seen.left_out] == [("2", reason)]


def test_numbers_keep_the_digits_that_a_float_would_lose(tmp_path: Path) -> None:
    digits = "7" * 5000
    (row,), _ = jsonl(
        tmp_path, b'{"a": 0.1, "b": 0.12345678901234567890, "c": 1e400, "d": ' + digits.encode() + b', "e": 1e5}'
    )
    assert row == {
        "a": 0.1,
        "b": Decimal("0.12345678901234567890"),
        "c": Decimal("1e400"),
        "d": Decimal(digits),
        "e": 1e5,
    }
    assert type(row["a"]) is type(row["e"]) is float


def test_a_file_that_may_not_be_read_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "set.jsonl").write_text("{}\n")
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(
        ConfigError, match=r"data\.train='.*set\.jsonl' cannot be read \(\[Errno 13\] Permission denied"
    ):
        read_rows(str(tmp_path / "set.jsonl"), "train", intake())


def test_columns_of_many_types_are_read(tmp_path: Path) -> None:
    table = pyarrow.table(
        {
            "decimal": pyarrow.array([Decimal("4.50"), None], pyarrow.decimal128(10, 2)),
            "date": [datetime.date(2024, 5, 1), None],
            "nanoseconds": pyarrow.array([1, 2], pyarrow.timestamp("ns", "UTC")),
            "binary": [b"\xff", b"a"],
            "large": pyarrow.array(["é", None], pyarrow.large_string()),
            "dictionary": pyarrow.array(["x", "y"]).dictionary_encode(),
            "narrow": pyarrow.array([0.1, None], pyarrow.float32()),
            "half": pyarrow.array(np.array([0.1, 2], np.float16)),
            "map": pyarrow.array([[("role", "user")], None], pyarrow.map_(pyarrow.string(), pyarrow.string())),
            "nothing": pyarrow.nulls(2),
        }
    )
    first, second = parquet(tmp_path, table)
    assert first["decimal"] == Decimal("4.50") and first["date"] == datetime.date(2024, 5, 1)
    assert first["nanoseconds"] == pandas.Timestamp(1, tz="UTC")
    assert (first["binary"], first["large"], first["dictionary"]) == (b"\xff", "é", "x")
    assert (first["narrow"], first["half"], second["half"], second["narrow"]) == (0.1, 0.1, 2.0, None)
    assert first["map"] == {"role": "user"} and second["map"] is None and first["nothing"] is None


def test_a_cell_that_cannot_be_converted_spoils_no_other(tmp_path: Path) -> None:
    not_utf8 = pyarrow.array([b"\xff", b"b", None], pyarrow.binary()).view(pyarrow.string())
    far = pyarrow.array([10**14, 0, None], pyarrow.int64()).view(pyarrow.timestamp("s"))
    twice = pyarrow.array([[("a", "1"), ("a", "2")], [], None], pyarrow.map_(pyarrow.string(), pyarrow.string()))
    table = pyarrow.table({"text": not_utf8, "time": far, "map": twice, "n": [1, 2, 3]})
    first, second, third = parquet(tmp_path, table)
    assert all(isinstance(first[name], Unreadable) for name in ("text", "time", "map")) and first["n"] == 1
    assert second == {"text": "b", "time": datetime.datetime(1970, 1, 1), "map": {}, "n": 2}
    assert third == {"text": None, "time": None, "map": None, "n": 3}


def test_a_column_that_is_there_twice_is_not_guessed(tmp_path: Path) -> None:
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"]), pyarrow.array([1])], ["x", "x", "y"])
    (row,) = parquet(tmp_path, table)
    assert row == {"x": Unreadable("two columns are called x"), "y": 1}


def test_folders_named_like_partitions_add_no_columns(tmp_path: Path) -> None:
    folder = tmp_path / "answer=5"
    folder.mkdir()
    assert parquet(folder, pyarrow.table({"prompt": ["p"]})) == [{"prompt": "p"}]


def test_a_damaged_file_is_one_sentence(tmp_path: Path) -> None:
    parquet(tmp_path, pyarrow.table({"a": [f"text {i}" for i in range(1000)]}))
    whole = (tmp_path / "set.parquet").read_bytes()
    for start in (4, len(whole) // 2, len(whole) - 200):
        (tmp_path / "bad.parquet").write_bytes(whole[:start] + b"\xa5" * 100 + whole[start + 100 :])
        with pytest.raises(ConfigError, match="is not a readable Parquet file"):
            read_rows(str(tmp_path / "bad.parquet"), "train", intake())


def test_a_row_of_a_datasets_set_that_cannot_be_decoded_is_left_out(tmp_path: Path, monkeypatch: Any) -> None:
    import datasets

    class Rows:
        """What matters of a Dataset."""

        def __len__(self) -> int:
            return 2500

        def __getitem__(self, which: int | slice) -> Any:
            places = range(2500)[which]
            if which == 1200 or (isinstance(which, slice) and 1200 in places):
                raise OSError("cannot identify image file")
            return {"n": places if which == places else list(places)}

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: Rows())
    seen = intake("somebody/pictures")
    rows = read_rows("somebody/pictures", "train", seen)
    assert [row["n"] for _, row in rows] == [n for n in range(2500) if n != 1200]
    assert [(each.where, each.reason) for each in seen.left_out] == [
        ("somebody/pictures:1200", "OSError: cannot identify image file")
    ]
    assert seen.total == 2500


def test_a_loader_may_fail_in_any_way(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def fail(*_: Any, **__: Any) -> None:
        raise KeyError("tag:yaml.org\nmore")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(ConfigError, match=r"data\.train='somebody/set' is neither .*\(KeyError: ") as caught:
        read_rows("somebody/set", "train", intake())
    assert "\n" not in str(caught.value)


def test_too_much_left_out_ends_with_the_counts_by_reason() -> None:
    def fail(row: dict[str, str]) -> None:
        raise KeyError(row["kind"])

    seen = intake(max_left_out=0.05)
    seen.total = 20
    assert seen.attempt("set:3", fail, {"kind": "a"}) is None
    seen.conclude()
    seen.attempt("set:4", fail, {"kind": "a\nb"})
    seen.attempt("set:5", json.loads, "[" * 100_000)
    seen.attempt("set:6", fail, {"kind": "a"})
    with pytest.raises(ConfigError) as caught:
        seen.conclude()
    assert str(caught.value) == (
        "data.train='set': 4 of 20 records cannot be used, and data.max_left_out=0.05 is the largest share that may be "
        "left out (2 KeyError: 'a': set:3, set:6; 1 KeyError: 'a\\nb': set:4; 1 nested too deeply: set:5); mend them, "
        "or raise data.max_left_out."
    )


def test_a_share_that_is_just_allowed_is_allowed() -> None:
    for total, allowed in ((100, 0.29), (20, 0.05), (3, 1 / 3)):
        seen = intake(max_left_out=allowed)
        seen.total = total
        for place in range(round(total * allowed)):
            seen.attempt(f"set:{place}", int, "x")
        assert seen.problem() is None
        seen.attempt("set:last", int, "x")
        assert "cannot be used" in (seen.problem() or "")


def test_many_reasons_are_counted_beyond_the_most_frequent() -> None:
    seen = intake()
    seen.total = 100
    for number in range(12):
        for place in range(12 - number):
            seen.attempt(f"set:{number}.{place}", int, "x" * (number + 1))
    text = seen.reasons()
    assert text.startswith("12 ValueError: invalid literal for int() with base 10: 'x': set:0.0, ")
    assert "set:0.9 and 2 more; 11 ValueError" in text
    assert text.endswith("; 28 for 7 other reasons")
