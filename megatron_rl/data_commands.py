"""`megatron-rl data ...`, and the options that it shares with the other commands."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from megatron_rl.config.heldout_sets import PUBLIC_SETS

ConfigFile = Annotated[Path, typer.Option("--config", "-c", help="Experiment file (YAML).")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]...", help="Override keys of the experiment file.")
]

data_app = typer.Typer(help="Training data.", no_args_is_help=True)


class Purpose(StrEnum):
    """What reads a set of `megatron-rl data check`."""

    train = "train"
    sft = "sft"
    eval = "eval"


def listed(text: str) -> list[str]:
    """The parts of a text between its commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


@data_app.command("prepare")
def prepare_data(
    name: Annotated[str, typer.Argument(help="deepmath, simplerl, eurus, gsm8k or dapo-math; NAME=FILE reads a copy.")],
    output: Annotated[Path, typer.Option("--output", help="Parquet file to write, for data.train.")],
    against: Annotated[
        str, typer.Option("--against", help="Evaluation sets to compare with, as in --sets; none: no comparison.")
    ] = ",".join(PUBLIC_SETS),
    ngram: Annotated[int, typer.Option("--ngram", min=1, help="So many equal words in a row are an overlap.")] = 13,
    keep_overlaps: Annotated[
        bool, typer.Option("--keep-overlaps", help="List problems that overlap, but do not leave them out.")
    ] = False,
    template: Annotated[
        str | None, typer.Option("--template", help="User message, with {problem}; default: the set's own.")
    ] = None,
    max_left_out: Annotated[
        float, typer.Option("--max-left-out", min=0, max=1, help="Share of a set's records that may be unusable.")
    ] = 0.05,
) -> None:
    """Write a public training set as Parquet, without duplicates and without problems of evaluation sets."""
    from megatron_rl.data.prepare import prepare
    from megatron_rl.observability.console import Console

    sets = [] if against == "none" else listed(against)
    prepare(name, output, sets, ngram, keep_overlaps, template, max_left_out, Console(enabled=True))


@data_app.command("check")
def check_data(
    name: Annotated[str, typer.Argument(metavar="FILE|NAME", help="A set as in data.train or data.eval.")],
    config: ConfigFile,
    overrides: Overrides = None,
    purpose: Annotated[Purpose, typer.Option("--for", help="What will read it.")] = Purpose.train,
    records: Annotated[int, typer.Option("--records", min=0, help="So many of the first records are printed.")] = 3,
) -> None:
    """Print what a run would read: counts, lengths, the first records as the model sees them, and what is left out."""
    from megatron_rl.config import load_config
    from megatron_rl.config.hub import pin_model
    from megatron_rl.data.check import check

    check(name, pin_model(load_config(config, overrides or [])), purpose.value, records)
