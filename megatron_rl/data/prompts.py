"""Prompts to train and evaluate on, whatever layout they come in.

A source of one's own is a function without arguments, named in `data.train` or `data.eval` as
`package.module:function`, that returns or yields records: dicts with the columns of a file (`docs/data.md`).
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from megatron_rl.config import ConfigError
from megatron_rl.config.sections import DataConfig
from megatron_rl.data.arithmetic import arithmetic_problems
from megatron_rl.data.chat import Messages, read_prompt, read_response, render
from megatron_rl.data.intake import BrokenRecord, Intake, Row
from megatron_rl.data.public import EVALUATION, PROBLEM, read_problems, split_spec
from megatron_rl.data.rows import read_rows
from megatron_rl.data.values import as_dict, identifier, plain, text_of
from megatron_rl.models.token_ids import encode_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

Column = Literal["answer", "response"]

ENCODED_AT_ONCE = 1000  # texts


@dataclass(frozen=True)
class Prompt:
    """One prompt. `prompt_id` is stable: it does not depend on the order or the number of the other prompts, except
    that the second and later of equal ids get `-2`, `-3`, ... in the order of the file."""

    prompt_id: str
    token_ids: list[int]
    answer: str
    source: str  # name of the data set; verl's `data_source` when there is one
    text: str  # what token_ids encode, the chat template applied
    response_text: str | None = None  # demonstration for `sft`
    response_ids: list[int] | None = None  # what it is as tokens, without the end of the sequence; read for `sft` only
    chat: bool = False  # whether it was chat messages


@dataclass(frozen=True)
class PromptSet:
    """A set as a run reads it."""

    prompts: list[Prompt]
    intake: Intake
    """Counts the records, and names those that cannot be used."""
    too_long: dict[str, int]
    """Tokens of what is left out for its length alone, by its place: the prompt, or prompt and demonstration."""
    limit: str
    """That length, for messages."""

    def problem(self) -> str | None:
        """Why the set cannot be used, in a sentence; None when it can."""
        if (problem := self.intake.problem()) is not None or self.prompts:
            return problem
        return (
            f"{self.intake.key}={self.intake.name!r} has no usable prompt: of {self.intake.total} records, "
            f"{len(self.too_long)} are longer than {self.limit}."
        )


@dataclass(frozen=True)
class _Record:
    """A prompt before tokenization."""

    where: str
    prompt_id: str
    content: str | Messages
    answer: str
    source: str
    response: str | None


def load_prompts(
    name: str,
    data: DataConfig,
    tokenizer: "PreTrainedTokenizerBase",
    split: str,
    heldout: bool,
    needs: Column = "answer",
    max_tokens: int | None = None,
) -> list[Prompt]:
    """Read and tokenize one set of prompts.

    Args:
        name: `arithmetic`, `arithmetic-heldout`, a `.jsonl` or `.parquet` file, a user's `package.module:function`, or
            a `datasets` name; for a held-out set also `NAME` or `NAME=FILE` of a public one.
        data: the `data` section.
        tokenizer: a `transformers` tokenizer; chat messages go through its template.
        split: split of a `datasets` name.
        heldout: whether this is a set of `data.eval`, for messages.
        needs: the column that must be there: `answer` to score responses, `response` to imitate them.
        max_tokens: of a prompt with its demonstration and the end of the sequence; None: no limit.

    Returns:
        The prompts in the order of the set. Records that cannot be used, and those that are too long, are left out and
        counted in the log.

    Raises:
        ConfigError: when the set cannot be read, lacks a column, has no usable prompt, or more than
            `data.max_left_out` of its records cannot be used.
    """
    found = read_prompts(name, data, tokenizer, split, heldout, needs, max_tokens)
    if (problem := found.problem()) is not None:
        raise ConfigError(problem)
    found.intake.conclude()
    if found.too_long:
        count, total = len(found.too_long), len(found.too_long) + len(found.prompts)
        log.warning("%s: %d of %d prompts left out (longer than %s)", name, count, total, found.limit)
    return found.prompts


def read_prompts(
    name: str,
    data: DataConfig,
    tokenizer: "PreTrainedTokenizerBase",
    split: str,
    heldout: bool,
    needs: Column = "answer",
    max_tokens: int | None = None,
) -> PromptSet:
    """The same as `load_prompts` with what is left out, however much that is.

    Raises:
        ConfigError: when the set cannot be read or lacks a column.
    """
    intake = Intake(name, "data.eval" if heldout else "data.train", "data.max_left_out", data.max_left_out)
    records = _arithmetic_records(name, data)
    if heldout and split_spec(name, EVALUATION) is not None:
        records = _public_records(name, data, tokenizer.chat_template is not None, intake)
    elif not records:
        records = _file_records(name, data, split, needs, intake)
    else:
        intake.total = len(records)
    unique = _unique([record.prompt_id for record in records])
    records = [replace(record, prompt_id=prompt_id) for record, prompt_id in zip(records, unique, strict=True)]
    prompts: list[Prompt] = []
    too_long: dict[str, int] = {}
    for record, prompt in _tokenized(records, tokenizer, needs == "response", intake):
        length = len(prompt.token_ids)
        total = length + len(prompt.response_ids or []) + 1
        if length > data.max_prompt_tokens:
            too_long[record.where] = length
        elif max_tokens is not None and total > max_tokens:
            too_long[record.where] = total
        else:
            prompts.append(prompt)
    limit = f"data.max_prompt_tokens={data.max_prompt_tokens}"
    limit += f", or than {max_tokens} tokens with the demonstration" if max_tokens is not None else ""
    return PromptSet(prompts, intake, too_long, limit)


def _arithmetic_records(name: str, data: DataConfig) -> list[_Record]:
    if name not in ("arithmetic", "arithmetic-heldout"):
        return []
    problems = arithmetic_problems(data.arithmetic, data.seed, heldout=name == "arithmetic-heldout")
    return [_Record(f"{name}:{i}", f"{name}/{i}", p.prompt, p.answer, name, p.response) for i, p in enumerate(problems)]


def _public_records(spec: str, data: DataConfig, chat: bool, intake: Intake) -> list[_Record]:
    name = spec.partition("=")[0]
    template = data.templates.get(name, EVALUATION[name].template)
    records = []
    for where, problem in read_problems(spec, EVALUATION, intake).items():
        text = template.replace(PROBLEM, problem.text)
        content: str | Messages = [{"role": "user", "content": text}] if chat else text
        records.append(_Record(where, f"{name}/{problem.index}", content, problem.answer, name, None))
    return records


def _file_records(name: str, data: DataConfig, split: str, needs: Column, intake: Intake) -> list[_Record]:
    rows = read_rows(name, split, intake)
    if not rows and not intake.left_out:
        raise ConfigError(f"{intake.key}={name!r} has no records.")
    if rows:
        _check_columns([row for _, row in rows], data, needs, intake)
    records = (intake.attempt(where, _record, where, row, name, data, needs) for where, row in rows)
    return [record for record in records if record is not None]


def _check_columns(rows: list[Row], data: DataConfig, needs: Column, intake: Intake) -> None:
    columns = sorted({column for row in rows for column in row})
    wanted = {"data.prompt_key": data.prompt_key}
    if needs == "response":
        wanted["data.response_key"] = data.response_key
    elif not any(_verl_answer(row) is not None for row in rows):
        wanted["data.answer_key"] = data.answer_key
    for setting, column in wanted.items():
        if column not in columns:
            raise ConfigError(
                f"{setting}={column!r} is not a column of {intake.key}={intake.name!r}; it has {', '.join(columns)}."
            )


def _record(where: str, row: Row, name: str, data: DataConfig, needs: Column) -> _Record:
    content = read_prompt(row.get(data.prompt_key))
    answer = _column(_answer, needs == "answer", row, data)
    response = _column(read_response, needs == "response", row.get(data.response_key))
    source = identifier(row.get("data_source")) or name
    return _Record(where, _row_id(row, content, answer, source), content, answer or "", source, response)


def _column(read: Callable[..., str], needed: bool, *arguments: object) -> str | None:
    """What `read` finds in a column, or None where it finds nothing usable and that does not matter."""
    try:
        return read(*arguments)
    except Exception:
        if needed:
            raise
        return None


def _answer(row: Row, data: DataConfig) -> str:
    # verl's files may hold other columns of the same names, so its reward_model goes first.
    verl_answer = _verl_answer(row)
    return text_of(plain(row.get(data.answer_key) if verl_answer is None else verl_answer), "answer")


def _verl_answer(row: Row) -> Any:
    return as_dict(row.get("reward_model")).get("ground_truth")


def _row_id(row: Row, content: str | Messages, answer: str | None, source: str) -> str:
    index = identifier(as_dict(row.get("extra_info")).get("index"))
    for value in (identifier(row.get("id")), identifier(row.get("prompt_id")), index and f"{source}/{index}"):
        if value is not None:
            return value
    text = json.dumps([content, answer], sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _unique(ids: Sequence[str]) -> Iterator[str]:
    used: set[str] = set()
    copies: Counter[str] = Counter()
    for name in ids:
        candidate = name
        while candidate in used:
            copies[name] += 1
            candidate = f"{name}-{copies[name] + 1}"
        used.add(candidate)
        yield candidate


def _tokenized(
    records: list[_Record], tokenizer: "PreTrainedTokenizerBase", with_responses: bool, intake: Intake
) -> Iterator[tuple[_Record, Prompt]]:
    """The records whose texts can be rendered and encoded, in their order."""
    rendered = []
    for record in records:
        text = intake.attempt(record.where, _render, record.content, tokenizer)
        if text is not None:
            rendered.append((record, text))
    # A chat template writes the special tokens itself; a plain text gets those that the tokenizer adds.
    prompts = [(record.where, text, isinstance(record.content, str)) for record, text in rendered]
    responses = [(record.where, record.response or "", False) for record, _ in rendered] if with_responses else []
    prompt_ids = _encode(prompts, tokenizer, intake)
    response_ids = _encode([each for each in responses if each[0] in prompt_ids], tokenizer, intake)
    for record, text in rendered:
        ids, response = prompt_ids.get(record.where), response_ids.get(record.where)
        if ids is not None and (response is not None or not with_responses):
            chat = not isinstance(record.content, str)
            prompt = Prompt(record.prompt_id, ids, record.answer, record.source, text, record.response, response, chat)
            yield record, prompt


def _render(content: str | Messages, tokenizer: "PreTrainedTokenizerBase") -> str:
    return content if isinstance(content, str) else render(content, tokenizer)


def _encode(
    texts: list[tuple[str, str, bool]], tokenizer: "PreTrainedTokenizerBase", intake: Intake
) -> dict[str, list[int]]:
    """Token ids by place, of (place, text, whether the tokenizer adds its special tokens)."""
    ids: dict[str, list[int]] = {}
    for special in (False, True):
        chosen = [(where, text) for where, text, adds in texts if adds is special]
        for start in range(0, len(chosen), ENCODED_AT_ONCE):
            part = chosen[start : start + ENCODED_AT_ONCE]
            try:
                encoded = encode_prompts([text for _, text in part], tokenizer, chat=not special)
                found: dict[str, list[int] | None] = dict(zip((where for where, _ in part), encoded, strict=True))
            except Exception:  # of one of them; each is tried alone
                found = {where: intake.attempt(where, _encode_one, text, tokenizer, special) for where, text in part}
            for where, token_ids in found.items():
                if token_ids is not None and (some := intake.attempt(where, _some_tokens, token_ids)):
                    ids[where] = some
    return ids


def _encode_one(text: str, tokenizer: "PreTrainedTokenizerBase", special: bool) -> list[int]:
    return encode_prompts([text], tokenizer, chat=not special)[0]


def _some_tokens(token_ids: Sequence[int]) -> list[int]:
    if not token_ids:
        raise BrokenRecord("a text without tokens")
    return list(token_ids)
