"""Prompts to train and evaluate on, whatever layout they come in.

A source of one's own is a function without arguments, named in `data.train` or `data.eval` as
`package.module:function`, that returns or yields records: dicts with the columns of a file (`docs/data.md`).
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal

from megatron_rl.config import ConfigError
from megatron_rl.config.sections import DataConfig
from megatron_rl.data.arithmetic import arithmetic_problems
from megatron_rl.data.public import EVALUATION, PROBLEM, read_problems, split_spec
from megatron_rl.data.rows import Row, read_rows, warn_broken

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

Column = Literal["answer", "response"]


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


@dataclass(frozen=True)
class _Record:
    """A prompt before tokenization."""

    prompt_id: str
    content: str | list[dict[str, Any]]
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

    Returns:
        The prompts in the order of the set; broken records and over-long prompts are left out and counted in the log.

    Raises:
        ConfigError: when the set cannot be read, lacks a column, or has no usable prompt.
    """
    key = "data.eval" if heldout else "data.train"
    records = _arithmetic_records(name, data)
    if heldout and split_spec(name, EVALUATION) is not None:
        records = _public_records(name, data, key, tokenizer.chat_template is not None)
    records = records or _file_records(name, data, key, split, needs)
    texts = [_render(record.content, tokenizer, key, name) for record in records]
    token_ids = _encode(texts, records, tokenizer)
    prompts = [
        Prompt(prompt_id, ids, record.answer, record.source, text, record.response)
        for prompt_id, record, text, ids in zip(
            _unique([record.prompt_id for record in records]), records, texts, token_ids, strict=True
        )
    ]
    kept = [prompt for prompt in prompts if 0 < len(prompt.token_ids) <= data.max_prompt_tokens]
    if len(kept) < len(prompts):
        log.warning(
            "%s: %d of %d prompts left out (empty, or longer than data.max_prompt_tokens=%d)",
            name,
            len(prompts) - len(kept),
            len(prompts),
            data.max_prompt_tokens,
        )
    if not kept:
        raise ConfigError(
            f"{key}={name!r} has no usable prompt: {len(prompts)} read, none with 1 to "
            f"data.max_prompt_tokens={data.max_prompt_tokens} tokens."
        )
    return kept


def _arithmetic_records(name: str, data: DataConfig) -> list[_Record]:
    if name not in ("arithmetic", "arithmetic-heldout"):
        return []
    problems = arithmetic_problems(data.arithmetic, data.seed, heldout=name == "arithmetic-heldout")
    return [_Record(f"{name}/{i}", p.prompt, p.answer, name, p.response) for i, p in enumerate(problems)]


def _public_records(spec: str, data: DataConfig, key: str, chat: bool) -> list[_Record]:
    name = spec.partition("=")[0]
    template = data.templates.get(name, EVALUATION[name].template)
    records = []
    for problem in read_problems(spec, EVALUATION, key):
        text = template.replace(PROBLEM, problem.text)
        content: str | list[dict[str, Any]] = [{"role": "user", "content": text}] if chat else text
        records.append(_Record(f"{name}/{problem.index}", content, problem.answer, name, None))
    return records


def _file_records(name: str, data: DataConfig, key: str, split: str, needs: Column) -> list[_Record]:
    rows = read_rows(name, key, split)
    if not rows:
        raise ConfigError(f"{key}={name!r} has no records.")
    _check_columns([row for _, row in rows], name, data, key, needs)
    records, broken = [], []
    for where, row in rows:
        record = _record(row, name, data, needs)
        if record is None:
            broken.append(where)
        else:
            records.append(record)
    if not records:
        raise ConfigError(
            f"{key}={name!r}: no record has both a prompt (a text or a list of chat messages) and a text or number as "
            f"{needs} (the first is {broken[0]})."
        )
    warn_broken(broken, len(rows), f"no usable prompt or {needs}")
    return records


def _check_columns(rows: list[Row], name: str, data: DataConfig, key: str, needs: Column) -> None:
    columns = sorted({column for row in rows for column in row})
    wanted = {"data.prompt_key": data.prompt_key}
    if needs == "response":
        wanted["data.response_key"] = data.response_key
    elif not any(_verl_answer(row) is not None for row in rows):
        wanted["data.answer_key"] = data.answer_key
    for setting, column in wanted.items():
        if column not in columns:
            raise ConfigError(f"{setting}={column!r} is not a column of {key}={name!r}; it has {', '.join(columns)}.")


def _record(row: Row, name: str, data: DataConfig, needs: Column) -> _Record | None:
    content = row.get(data.prompt_key)
    # verl's files may hold other columns of the same names, so its reward_model goes first.
    verl_answer = _verl_answer(row)
    answer = _text(row.get(data.answer_key) if verl_answer is None else verl_answer)
    response = _text(row.get(data.response_key))
    if content is None or not _is_prompt(content) or (answer if needs == "answer" else response) is None:
        return None
    source = str(row.get("data_source") or name)
    return _Record(_row_id(row, content, answer, source), content, answer or "", source, response)


def _verl_answer(row: Row) -> Any:
    reward_model = row.get("reward_model")
    return reward_model.get("ground_truth") if isinstance(reward_model, dict) else None


def _text(value: Any) -> str | None:
    """Answers may be texts, numbers or, in verl's layout, lists of texts."""
    if value is None or isinstance(value, str):
        return value
    return str(value) if isinstance(value, Real) else json.dumps(value, default=str)


def _is_prompt(content: Any) -> bool:
    if isinstance(content, str):
        return bool(content)
    return (
        isinstance(content, list)
        and bool(content)
        and all(isinstance(message, dict) and {"role", "content"} <= message.keys() for message in content)
    )


def _row_id(row: Row, content: Any, answer: str | None, source: str) -> str:
    extra = row.get("extra_info")
    index = extra.get("index") if isinstance(extra, dict) else None
    for value in (row.get("id"), row.get("prompt_id"), None if index is None else f"{source}/{index}"):
        if value is not None:
            return str(value)
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


def _render(content: Any, tokenizer: "PreTrainedTokenizerBase", key: str, name: str) -> str:
    if isinstance(content, str):
        return content
    if tokenizer.chat_template is None:
        raise ConfigError(
            f"{key}={name!r} holds chat messages but the tokenizer of model.path has no chat template; "
            f"use a chat model or a column of texts as data.prompt_key."
        )
    return str(tokenizer.apply_chat_template(content, add_generation_prompt=True, tokenize=False))


def _encode(texts: list[str], records: list[_Record], tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    # A chat template writes the special tokens itself; a plain text gets those that the tokenizer adds.
    ids: list[list[int]] = [[] for _ in texts]
    for chat in (False, True):
        chosen = [i for i, record in enumerate(records) if isinstance(record.content, list) is chat]
        if chosen:
            encoded = tokenizer([texts[i] for i in chosen], add_special_tokens=not chat)["input_ids"]
            for i, token_ids in zip(chosen, encoded, strict=True):
                ids[i] = list(token_ids)
    return ids
