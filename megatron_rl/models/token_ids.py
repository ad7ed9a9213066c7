"""What the ids of a model's tokens mean: the one place where its tokenizer and its two configurations are reconciled.

`tokenizer_config.json`, `config.json` and `generation_config.json` each name special tokens, and often not the same
ones. Engines, trainer, `sft`, evaluation and exports all go by `TokenIds`, so that what a policy is taught to end with
can be sampled, and ends.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_rl.config import ConfigError
from megatron_rl.config.hub import local_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
MARK = "MARK"
"""The content of a message, to be found again in what a chat template makes of it."""
SHOWN = 3
"""Tokens that a message names at most."""


@dataclass(frozen=True)
class TokenIds:
    """The ids of a model that its files agree upon."""

    limit: int
    """Ids from here on mean nothing to the tokenizer or have no row in the model: they are never sampled, and are
    excluded from every distribution."""
    ends: tuple[int, ...]
    """Any of these ends a response: what the tokenizer, its chat template and the two configurations name."""
    text_end: int
    """What `sft` ends a response with after a plain text: the tokenizer's own end."""
    turn_end: int
    """The same after chat messages: the special token with which the chat template ends a turn."""
    padding: int | None = None
    """What names the padding, where the model has it. Nothing here is padded with a token, so it may be an end too."""

    def ended(self, response: Sequence[int], chat: bool) -> list[int]:
        """A demonstration with its end.

        Args:
            response: token ids; one that ends already, as its text had it, stays as it is.
            chat: whether the prompt is chat messages.
        """
        if response and response[-1] in self.ends:
            return list(response)
        return [*response, self.turn_end if chat else self.text_end]


def load_tokenizer(path: str) -> "PreTrainedTokenizerBase":
    """The tokenizer of the model `path`, a folder or a name on the hub.

    Raises:
        ConfigError: when it has none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(local_folder(path))
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path={path!r} has no tokenizer that loads ({str(error).splitlines()[0]}).") from None


def read_token_ids(path: str | Path, tokenizer: "PreTrainedTokenizerBase", vocab_size: int) -> TokenIds:
    """Reconcile what the files of a model say; where they name different ends, all of them count, and a line says so.

    Args:
        path: the model's folder, or its name on the hub.
        tokenizer: the model's.
        vocab_size: rows of its embedding.

    Raises:
        ConfigError: when they cannot be reconciled: nothing ends a response, or what does cannot be sampled or is
            ordinary text; the tokenizer has tokens for which the model has no room; or a file cannot be read.
    """
    folder, where = local_folder(path), f"model.path={str(path)!r}"
    limit = _limit(tokenizer, vocab_size, where)
    named = end_ids(folder)
    for file, numbers in named.items():
        for number in numbers:
            _check_end(number, tokenizer, limit, f"{file} of {where}")
    own, turn = tokenizer.eos_token_id, _turn_end(tokenizer)
    every = [own, turn, *(number for numbers in named.values() for number in numbers)]
    ends = tuple(dict.fromkeys(number for number in every if number is not None))
    if not ends:
        raise ConfigError(
            f"{where}: no token ends a response, so all would run to rollout.max_tokens: the tokenizer has no "
            f"eos_token, and neither {CONFIG} nor {GENERATION_CONFIG} has an eos_token_id; name one in "
            "tokenizer_config.json."
        )
    text_end = ends[0] if own is None else own
    _tell_difference(text_end, ends, named, tokenizer, where)
    padding = tokenizer.pad_token_id
    return TokenIds(
        limit,
        ends,
        text_end,
        turn_end=text_end if turn is None else turn,
        padding=padding if padding is not None and padding < limit else None,
    )


def end_ids(folder: Path) -> dict[str, list[int]]:
    """By the name of the file, the `eos_token_id` of a model's two configurations; null or no file: none.

    Raises:
        ConfigError: when a file is not JSON, or its value is no token id.
    """
    found = {}
    for name in (GENERATION_CONFIG, CONFIG):
        file = folder / name
        value = _read_json(file).get("eos_token_id") if file.is_file() else None
        numbers = value if isinstance(value, list) else [] if value is None else [value]
        if any(isinstance(number, bool) or not isinstance(number, int) for number in numbers):
            raise ConfigError(f"{file}: eos_token_id={value!r} is neither a token id nor a list of them; correct it.")
        found[name] = list(numbers)
    return found


def state_ends(folder: Path, tokens: TokenIds) -> bool:
    """Let `generation_config.json` of an exported model name every end, so that other programs stop at them too.

    Args:
        folder: the model.
        tokens: its ids.

    Returns:
        Whether the file had to be changed.
    """
    file = folder / GENERATION_CONFIG
    named = end_ids(folder)
    if set(named[GENERATION_CONFIG] or named[CONFIG]) >= set(tokens.ends):
        return False
    content = _read_json(file) if file.is_file() else {}
    content["eos_token_id"] = list(tokens.ends) if len(tokens.ends) > 1 else tokens.ends[0]
    if content.get("pad_token_id") is None and tokens.padding is not None:
        content["pad_token_id"] = tokens.padding
    draft = file.with_suffix(".tmp")
    draft.write_text(json.dumps(content, indent=2) + "\n")
    draft.replace(file)
    return True


def encode_prompts(texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase", chat: bool) -> list[list[int]]:
    """The token ids of prompts.

    A chat template writes special tokens itself. A plain text gets those that the tokenizer puts in front unasked,
    such as `<bos>`, unless it has them already, and none that it puts behind: the response would follow an end.

    Args:
        texts: the prompts, with the chat template applied.
        tokenizer: the model's.
        chat: whether they are from chat messages.
    """
    encoded = [list(ids) for ids in tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]]
    front = [] if chat else added_in_front(tokenizer)
    return [ids if ids[: len(front)] == front else front + ids for ids in encoded]


def added_in_front(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The special tokens that the tokenizer puts before a plain text unasked."""
    bare = list(tokenizer(MARK, add_special_tokens=False)["input_ids"])
    whole = list(tokenizer(MARK, add_special_tokens=True)["input_ids"])
    starts = range(len(whole) - len(bare) + 1)
    return next((whole[:start] for start in starts if whole[start : start + len(bare)] == bare), [])


def _limit(tokenizer: "PreTrainedTokenizerBase", vocab_size: int, where: str) -> int:
    """One more than the highest id that the tokenizer knows and the model has.

    A padding token alone may lie outside of the model, because nothing is ever padded with it.
    """
    known = {number: token for token, number in tokenizer.get_vocab().items()}
    known |= {number: str(token) for number, token in tokenizer.added_tokens_decoder.items()}
    outside = [number for number in sorted(known) if number >= vocab_size]
    used = {tokenizer.eos_token_id, tokenizer.bos_token_id, _turn_end(tokenizer)}
    homeless = [number for number in outside if number != tokenizer.pad_token_id or number in used]
    if homeless:
        shown = ", ".join(f"{known[number]!r} ({number})" for number in homeless[:SHOWN])
        more = f" and {len(homeless) - SHOWN} more" if len(homeless) > SHOWN else ""
        raise ConfigError(
            f"{where}: its tokenizer has {shown}{more}, but vocab_size={vocab_size} in {CONFIG} has no room for "
            "them; use the model's own tokenizer, or add these rows to its embedding."
        )
    return 1 + max((number for number in known if number < vocab_size), default=vocab_size - 1)


def _check_end(number: int, tokenizer: "PreTrainedTokenizerBase", limit: int, where: str) -> None:
    if not 0 <= number < limit:
        raise ConfigError(
            f"{where} ends a response with eos_token_id {number}, which can never be sampled: tokenizer and model have "
            f"the ids 0 to {limit - 1}; correct it, or use the model's own tokenizer."
        )
    if number not in tokenizer.all_special_ids and number not in tokenizer.added_tokens_decoder:
        raise ConfigError(
            f"{where} ends a response with eos_token_id {number}, but to the tokenizer that is the ordinary text "
            f"{tokenizer.convert_ids_to_tokens(number)!r}, at which responses would be cut off; correct it, or use the "
            "model's own tokenizer."
        )


def _turn_end(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """The special token with which the chat template ends the assistant's turn; None: there is none."""
    if tokenizer.chat_template is None:
        return None
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": MARK}]
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception:  # a template may raise anything at a conversation that it does not expect
        return None
    _, found, rest = text.rpartition(MARK)
    ids = tokenizer(rest, add_special_tokens=False)["input_ids"] if found and rest else []
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return next((number for number in ids if number in special and number != tokenizer.unk_token_id), None)


def _tell_difference(
    own: int, ends: tuple[int, ...], named: dict[str, list[int]], tokenizer: "PreTrainedTokenizerBase", where: str
) -> None:
    """Say it when a configuration names ends, and the tokenizer's is not among them."""
    others = [f"{file} names {' and '.join(map(str, ids))}" for file, ids in named.items() if ids and own not in ids]
    if others:
        tokens = ", ".join(f"{tokenizer.convert_ids_to_tokens(number)!r} ({number})" for number in ends)
        log.warning(
            "%s: the tokenizer ends a response with %d, but %s: each of %s ends one",
            where,
            own,
            " and ".join(others),
            tokens,
        )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} is not valid JSON ({error}).") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file} has to hold a JSON object.")
    return content
