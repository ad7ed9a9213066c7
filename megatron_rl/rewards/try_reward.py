"""`megatron-rl rewards FILE`: a reward tried on the responses of a file."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from megatron_rl.config import ConfigError
from megatron_rl.config.import_path import IMPORT_PATH
from megatron_rl.config.sections import RewardConfig
from megatron_rl.data.intake import BrokenRecord, Intake, Row
from megatron_rl.data.rows import read_rows
from megatron_rl.observability.terminal import standard_output
from megatron_rl.rewards.builtin import BUILTIN
from megatron_rl.rewards.score import Score, ScoreItem, Scorer

SHOWN = 60
"""Characters of a text in the table."""


@dataclass(frozen=True)
class Tried:
    """What the reward made of one response."""

    record: str
    """Its `id`, or its place in the file."""
    score: float
    expected: str | None
    """The reference answer as it was read; None with a function of the user's."""
    found: str | None
    """The final answer that was read from the response."""
    why: str


def reward_config(name: str, timeout_s: float, environment: list[str]) -> RewardConfig:
    """The section `reward` for a built-in reward or a function `package.module:function`.

    Raises:
        ConfigError: when `name` is neither.
    """
    if name in BUILTIN:
        return RewardConfig.model_validate({"name": name, "timeout_s": timeout_s, "environment": environment})
    if not IMPORT_PATH.fullmatch(name):
        raise ConfigError(f"--reward={name!r} is neither one of {', '.join(BUILTIN)} nor package.module:function.")
    return RewardConfig(function=name, timeout_s=timeout_s, environment=environment)


def try_reward(file: Path, reward: RewardConfig, output: Path | None = None) -> list[Tried]:
    """Score the responses of `file`, print a table, and write it to `output` as JSON lines.

    Raises:
        ConfigError: when the file has no usable record, or the reward cannot be used.
    """
    items = _items(file)
    with Scorer(reward, max_tokens=1) as scorer:
        scores = scorer.attempt(items)
    tried = [_tried(item, score) for item, score in zip(items, scores, strict=True)]
    if output is not None:
        output.write_text("".join(json.dumps(asdict(each)) + "\n" for each in tried), encoding="utf-8")
    _print(tried)
    return tried


def _items(file: Path) -> list[ScoreItem]:
    if file.suffix not in (".jsonl", ".parquet") or not file.is_file():
        raise ConfigError(f"FILE={str(file)!r} must be a .jsonl or .parquet file that exists.")
    intake = Intake(str(file), "FILE", "FILE", max_left_out=1.0)
    items = [intake.attempt(where, _item, where, row) for where, row in read_rows(str(file), "", intake)]
    if not intake.total:
        raise ConfigError(f"FILE={str(file)!r} has no records.")
    intake.conclude()
    return [item for item in items if item is not None]


def _item(where: str, row: Row) -> ScoreItem:
    response, answer = _text(row, "response"), _text(row, "answer")
    if response is None or answer is None:
        raise BrokenRecord("without a response or an answer")
    return ScoreItem(_text(row, "prompt") or "", response, answer, 0, str(row.get("id", where)))


def _text(row: Row, key: str) -> str | None:
    """As a run gives it to the reward: numbers as texts, lists and dicts as JSON."""
    value: Any = row.get(key)
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, default=str) if isinstance(value, list | dict) else str(value)


def _tried(item: ScoreItem, score: Score) -> Tried:
    reading = score.reading
    if score.error is not None:
        return Tried(item.record_id, 0.0, None, None, score.error)
    if reading is None:
        return Tried(item.record_id, score.value, None, None, "")
    return Tried(item.record_id, score.value, reading.expected, reading.found, reading.why)


def _print(tried: list[Tried]) -> None:
    table = Table("record", "score", "reference read as", "response read as", "why")
    for each in tried:
        texts = (each.record, f"{each.score:g}", each.expected, each.found, each.why)
        table.add_row(*(Text(_short(text)) for text in texts))
    terminal = standard_output()
    terminal.print(table)
    mean = sum(each.score for each in tried) / len(tried)
    terminal.print(f"{len(tried)} responses, mean score {mean:.3f}", highlight=False)


def _short(text: str | None) -> str:
    text = "-" if text is None else " ".join(text.split())
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."
