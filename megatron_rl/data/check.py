"""`megatron-rl data check`: what a run would read of a set, before it does."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.table import Table
from rich.text import Text

from megatron_rl.config import Config, ConfigError
from megatron_rl.config.families import scratch_config
from megatron_rl.config.model_fit import read_hf_config
from megatron_rl.data.prompts import Column, Prompt, PromptSet, read_prompts
from megatron_rl.observability.terminal import Terminal, standard_output

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PERCENTILES = {"least": 0, "median": 50, "90 %": 90, "99 %": 99, "most": 100}
PROMPT_ENDS = "<<< the prompt ends here >>>"
DEMONSTRATION_ENDS = "<<< the demonstration ends here >>>"


def check(name: str, config: Config, purpose: str, count: int, terminal: Terminal | None = None) -> None:
    """Read a set as a run would, and print what came of it.

    Args:
        name: as in `data.train`; with `purpose="eval"` as in `data.eval`.
        config: the experiment whose tokenizer, columns and limits are used.
        purpose: `train`, `sft` or `eval`.
        count: so many of the first records are printed.
        terminal: where to print, standard output when left out.

    Raises:
        ConfigError: when a run could not use the set; what can be said of it is printed first.
    """
    terminal = terminal or standard_output()
    tokenizer = _tokenizer(config)
    split = config.data.eval_split if purpose == "eval" else config.data.split
    needs: Column = "response" if purpose == "sft" else "answer"
    longest = _longest_sequence(config) if purpose == "sft" else None
    found = read_prompts(name, config.data, tokenizer, split, purpose == "eval", needs, longest)
    terminal.print(_counts(found, tokenizer))
    if found.prompts:
        terminal.print(_lengths(found.prompts))
    for prompt in found.prompts[:count]:
        terminal.print(_shown(prompt, tokenizer), soft_wrap=True)
    if found.intake.left_out or found.too_long:
        terminal.print(_left_out(found))
    if (problem := found.problem()) is not None:
        raise ConfigError(problem)


def _tokenizer(config: Config) -> "PreTrainedTokenizerBase":
    """That of the model, or of the one that `sft` would make."""
    if config.model.scratch is not None and not (Path(config.model.path) / "config.json").exists():
        from megatron_rl.models.scratch import character_tokenizer

        return character_tokenizer(config.model.scratch.max_positions)
    from megatron_rl.models.token_ids import load_tokenizer

    return load_tokenizer(config.model.path)


def _longest_sequence(config: Config) -> int:
    """Tokens that `sft` takes of a prompt with its demonstration."""
    if config.model.scratch is not None and not (Path(config.model.path) / "config.json").exists():
        hf = scratch_config(config.model.scratch)
    else:
        hf = read_hf_config(config.model.path, config.model.family)
    limit = config.train.tokens_per_microbatch
    return min(limit, hf.get("max_position_embeddings", 2048))


def _counts(found: PromptSet, tokenizer: "PreTrainedTokenizerBase") -> Table:
    intake = found.intake
    table = Table("records", title=Text(_visible(intake.name)))
    table.add_column("number", justify="right")
    table.add_column("meaning")
    share = f"{len(intake.left_out) / max(intake.total, 1):.1%} of all; data.max_left_out={intake.max_left_out:g}"
    rows = [
        ("read", intake.total, ""),
        ("used", len(found.prompts), ""),
        ("left out", len(intake.left_out), f"cannot be used: {share}"),
        ("too long", len(found.too_long), f"longer than {found.limit}"),
    ]
    unknown = sum(tokenizer.unk_token_id in prompt.token_ids for prompt in found.prompts)
    if tokenizer.unk_token_id is not None and unknown:
        rows.append(("with unknown characters", unknown, f"the tokenizer has {tokenizer.unk_token} in their place"))
    for label, number, meaning in rows:
        table.add_row(label, str(number), Text(meaning))
    return table


def _lengths(prompts: Sequence[Prompt]) -> Table:
    table = Table("tokens")
    for heading in PERCENTILES:
        table.add_column(heading, justify="right")
    lengths = {"prompt": [len(prompt.token_ids) for prompt in prompts]}
    if prompts[0].response_ids is not None:
        lengths["demonstration"] = [len(prompt.response_ids or []) for prompt in prompts]
    for label, values in lengths.items():
        cells = np.percentile(values, list(PERCENTILES.values()), method="nearest")
        table.add_row(label, *(str(int(cell)) for cell in cells))
    return table


def _shown(prompt: Prompt, tokenizer: "PreTrainedTokenizerBase") -> Text:
    """A record as the model sees it, special tokens as they are called."""
    answer = f", answer {prompt.answer!r}" if prompt.answer else ""
    text = Text(_visible(f"\n{prompt.prompt_id}: {len(prompt.token_ids)} tokens, of {prompt.source}{answer}"), "bold")
    text.append("\n" + _visible(tokenizer.decode(prompt.token_ids, skip_special_tokens=False)), "not bold")
    text.append(PROMPT_ENDS, "reverse")
    if prompt.response_ids is not None:
        ids = [*prompt.response_ids, tokenizer.eos_token_id]
        text.append(_visible(tokenizer.decode(ids, skip_special_tokens=False)), "not bold")
        text.append(DEMONSTRATION_ENDS, "reverse")
    return text.append("\n")


def _left_out(found: PromptSet) -> Table:
    table = Table("left out", "reason", "more", title="Records left out")
    for record in found.intake.left_out:
        table.add_row(*(Text(_visible(cell), overflow="fold") for cell in (record.where, record.reason, record.detail)))
    for where, tokens in found.too_long.items():
        table.add_row(*(Text(_visible(cell), overflow="fold") for cell in (where, "too long", f"{tokens} tokens")))
    return table


def _visible(text: str) -> str:
    """A text whose control characters, which a terminal would obey, are written as escapes; line ends stay."""
    return "".join(
        letter if letter.isprintable() or letter == "\n" else letter.encode("unicode_escape").decode()
        for letter in text
    )
