"""`megatron-rl data prepare`: a public training set as a Parquet file in the layout that `data.train` reads.

Duplicates and problems with contradictory answers go, and so do problems that overlap with an evaluation set.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rl.config import ConfigError
from megatron_rl.data.decontamination import OverlapIndex
from megatron_rl.data.intake import Intake
from megatron_rl.data.public import EVALUATION, PROBLEM, TRAINING, Problem, PublicSet, read_problems, split_spec
from megatron_rl.observability.console import Console


@dataclass(frozen=True)
class BenchmarkOverlap:
    """A training problem that shares text with an evaluation problem."""

    problem: Problem
    evaluation: str
    """The problem of the evaluation set, `SET/ROW`."""
    shared: str
    """The tokens in a row that both have."""


def prepare(
    spec: str,
    output: Path,
    against: Sequence[str],
    ngram: int,
    keep_overlaps: bool,
    template: str | None,
    max_left_out: float,
    console: Console,
) -> None:
    """Write the set and, beside it, `<output>.overlaps.jsonl` with what overlaps.

    Args:
        spec: `NAME` or `NAME=FILE` of a training set.
        output: Parquet file to write.
        against: `NAME` or `NAME=FILE` of the evaluation sets to compare with.
        ngram: so many equal tokens in a row are an overlap.
        keep_overlaps: leave overlapping problems in; the file beside it names them all the same.
        template: the user's message, in which `{problem}` stands for the problem; None: the set's own.
        max_left_out: share in [0, 1] of a set's records that may be left out because they cannot be used.
        console: where the counts are shown.

    Raises:
        ConfigError: when a set cannot be read, the output cannot be used, or nothing is left to write.
    """
    check(spec, output, against, template)
    name = spec.partition("=")[0]
    problems = _usable_problems(spec, TRAINING, "NAME", max_left_out)
    unique, duplicates, contradictory = deduplicate(problems)
    with console.phase("comparing", len(unique)) as phase:
        overlaps = find_overlaps(unique, against, ngram, max_left_out, phase.advance)
    removed = set() if keep_overlaps else {overlap.problem.index for overlap in overlaps}
    kept = [problem for problem in unique if problem.index not in removed]
    if not kept:
        raise ConfigError(f"nothing is left of {spec!r}: all problems are contradictory or overlap with --against.")
    output.parent.mkdir(parents=True, exist_ok=True)
    _write_overlaps(overlaps, overlaps_file(output))
    _write_parquet(name, kept, template or TRAINING[name].template, output)
    console.info(
        f"{output}: {len(kept)} of {len(problems)} problems; left out {duplicates} duplicates and {contradictory} "
        "with contradictory answers."
    )
    names = ", ".join(each.partition("=")[0] for each in against) or "no evaluation set"
    console.info(
        f"{len(overlaps)} overlap with {names} ({ngram}-grams) and were {'kept' if keep_overlaps else 'left out'}: "
        f"{overlaps_file(output)}"
    )


def check(spec: str, output: Path, against: Sequence[str], template: str | None) -> None:
    """Everything that can be wrong with the command before a set is read.

    Raises:
        ConfigError: naming what to change.
    """
    if split_spec(spec, TRAINING) is None:
        raise ConfigError(
            f"{spec!r} is not a public training set; there are {', '.join(TRAINING)}, as NAME or NAME=FILE."
        )
    if output.suffix != ".parquet":
        raise ConfigError(f"--output {output} must end in .parquet.")
    if output.exists():
        raise ConfigError(f"--output {output} exists already; choose another file or remove it.")
    for name in against:
        if split_spec(name, EVALUATION) is None:
            raise ConfigError(f"--against {name!r} is not an evaluation set; there are {', '.join(EVALUATION)}.")
    if template is not None and PROBLEM not in template:
        raise ConfigError(f"--template {template!r} has no {PROBLEM}, where the problem goes.")


def deduplicate(problems: Sequence[Problem]) -> tuple[list[Problem], int, int]:
    """The first of equal problems, white space and case aside, the number of its copies, and of contradictory problems.

    Of problems whose copies have different answers, at least one answer is wrong: none of them is kept.
    """
    groups: defaultdict[str, list[Problem]] = defaultdict(list)
    for problem in problems:
        groups[" ".join(problem.text.lower().split())].append(problem)
    agreeing = [group for group in groups.values() if len({problem.answer for problem in group}) == 1]
    contradictory = len(problems) - sum(map(len, agreeing))
    duplicates = sum(len(group) - 1 for group in agreeing)
    return [group[0] for group in agreeing], duplicates, contradictory


def find_overlaps(
    problems: Iterable[Problem],
    against: Sequence[str],
    ngram: int,
    max_left_out: float,
    on_compared: Callable[[], None] = lambda: None,
) -> list[BenchmarkOverlap]:
    """The problems that share tokens with a problem of an evaluation set.

    Args:
        problems: of a training set.
        against: `NAME` or `NAME=FILE` of the evaluation sets.
        ngram: so many equal tokens in a row are an overlap.
        max_left_out: share in [0, 1] of a set's records that may be left out.
        on_compared: called after every problem.

    Raises:
        ConfigError: when a set cannot be read.
    """
    index = OverlapIndex(ngram)
    for spec in against:
        name = spec.partition("=")[0]
        heldout = _usable_problems(spec, EVALUATION, "--against", max_left_out)
        index.add((f"{name}/{problem.index}", problem.text) for problem in heldout)
    overlaps = []
    for problem in problems:
        if (found := index.find(problem.text)) is not None:
            overlaps.append(BenchmarkOverlap(problem, *found))
        on_compared()
    return overlaps


def _usable_problems(spec: str, sets: Mapping[str, PublicSet], key: str, max_left_out: float) -> list[Problem]:
    intake = Intake(spec, key, "--max-left-out", max_left_out)
    problems = read_problems(spec, sets, intake)
    intake.conclude()
    return list(problems.values())


def overlaps_file(output: Path) -> Path:
    """Where the overlaps of the set `output` are listed."""
    return output.with_suffix(".overlaps.jsonl")


def _write_overlaps(overlaps: Sequence[BenchmarkOverlap], file: Path) -> None:
    lines = [
        json.dumps(
            {"index": o.problem.index, "problem": o.problem.text, "overlaps_with": o.evaluation, "shared": o.shared}
        )
        for o in overlaps
    ]
    file.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def _write_parquet(name: str, problems: Sequence[Problem], template: str, file: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    draft = file.with_suffix(".tmp")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([_row(name, p, template) for p in problems]), draft)
    draft.replace(file)


def _row(name: str, problem: Problem, template: str) -> dict[str, Any]:
    """verl's layout, and the bare problem beside it, for `data.prompt_key=problem` with a model that has no chat
    template."""
    return {
        "data_source": name,
        "prompt": [{"role": "user", "content": template.replace(PROBLEM, problem.text)}],
        "problem": problem.text,
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": problem.answer},
        "extra_info": {"index": problem.index, "split": "train"},
    }
