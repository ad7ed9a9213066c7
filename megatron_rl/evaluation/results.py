"""What the responses to a problem gave, one JSON line per problem, kept so that an evaluation can be continued."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_rl.config import ConfigError

SETTINGS = "settings.json"


@dataclass(frozen=True)
class Outcome:
    """One response."""

    text: str
    answer: str | None
    """In a normal form, for votes; None when the response gives none."""
    correct: bool
    tokens: int
    finish_reason: str
    """`stop` or `length`."""
    error: str | None = None
    """Why it could not be scored; it counts as wrong."""


@dataclass(frozen=True)
class ProblemResult:
    """One problem with its responses."""

    problem_id: str
    prompt: str
    answer: str
    greedy: Outcome
    samples: list[Outcome]


class ResultsFile:
    """`<folder>/<set>.jsonl`, to which problems are appended as they finish."""

    def __init__(self, folder: Path, name: str) -> None:
        self.file = folder / f"{file_name(name)}.jsonl"

    def read(self) -> dict[str, ProblemResult]:
        """The problems that are done, by id; a last line that a crash cut off does not count.

        Raises:
            ConfigError: for any other line that is not a result.
        """
        if not self.file.exists():
            return {}
        lines = self.file.read_text(encoding="utf-8").split("\n")
        results = {}
        for number, line in enumerate(lines, 1):
            try:
                result = _parse(line) if line else None
            except (ValueError, KeyError, TypeError):
                if number == len(lines):  # without a newline: unfinished
                    continue
                raise ConfigError(
                    f"{self.file}:{number} is not a result of an evaluation; remove the file or choose another "
                    "--output."
                ) from None
            if result is not None:
                results[result.problem_id] = result
        return results

    def append(self, result: ProblemResult) -> None:
        """Add one problem."""
        with self.file.open("a", encoding="utf-8") as file:
            file.write(_line(result))

    def write(self, results: Sequence[ProblemResult]) -> None:
        """Replace the file by these problems, atomically."""
        draft = self.file.with_suffix(".tmp")
        draft.write_text("".join(map(_line, results)), encoding="utf-8")
        draft.replace(self.file)


def claim(folder: Path, settings: Mapping[str, Any], sets: Mapping[str, str]) -> None:
    """Note in `folder` what its results depend on.

    Args:
        folder: of the results; it is made.
        settings: plain values that all results have in common.
        sets: name -> specification of each set; those of earlier calls stay noted.

    Raises:
        ConfigError: when the folder holds results of other settings, or of another set of the same name.
    """
    file = folder / SETTINGS
    known: dict[str, Any] = {"settings": dict(settings), "sets": {}}
    if file.exists():
        try:
            known = json.loads(file.read_text(encoding="utf-8"))
            earlier = known["settings"] | {f"set {name}": known["sets"][name] for name in known["sets"]}
        except (ValueError, KeyError, TypeError):
            raise ConfigError(f"{file} cannot be read; remove the folder or choose another --output.") from None
        now = {**settings, **{f"set {name}": spec for name, spec in sets.items()}}
        # Compared as JSON gives them back, in which tuples are lists.
        for key, value in json.loads(json.dumps(now)).items():
            if (key in settings or key in earlier) and earlier.get(key) != value:
                raise ConfigError(
                    f"{folder} holds results with {key} = {earlier.get(key)!r}, not {value!r}; choose another --output "
                    "or remove the folder."
                )
    known["sets"] |= sets
    folder.mkdir(parents=True, exist_ok=True)
    draft = file.with_suffix(".tmp")
    draft.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
    draft.replace(file)


def file_name(name: str) -> str:
    """The name of a set as part of a file's name: `openai/gsm8k:main` becomes `openai_gsm8k_main`."""
    return "".join(letter if letter.isalnum() or letter in "-." else "_" for letter in name).lstrip(".") or "set"


def _parse(line: str) -> ProblemResult:
    record = json.loads(line)
    greedy, samples = Outcome(**record.pop("greedy")), [Outcome(**sample) for sample in record.pop("samples")]
    return ProblemResult(**record, greedy=greedy, samples=samples)


def _line(result: ProblemResult) -> str:
    return json.dumps(asdict(result)) + "\n"
