"""The public sets that go by a short name: where each is, how its rows read, and how a problem is put to the model.

`EVALUATION` holds those that `data.eval` and `megatron-rl eval --sets` accept, `TRAINING` those of `megatron-rl data
prepare`. `NAME` loads one through `datasets`, `NAME=FILE` from a local file with the same columns.
"""

import ast
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megatron_rl.config import ConfigError
from megatron_rl.data.chat import read_messages
from megatron_rl.data.intake import BrokenRecord, Intake, Row, described
from megatron_rl.data.rows import read_rows
from megatron_rl.data.values import as_dict, plain, text_of

PROBLEM = "{problem}"  # in templates; not str.format, because LaTeX is full of braces
BOXED = PROBLEM + "\n\nPlease reason step by step, and put your final answer within \\boxed{}."
LETTER = PROBLEM + "\n\nPlease reason step by step, and put the letter of your choice within \\boxed{}."

EURUS_ENDING = "\n\nPresent the answer in LaTex format: \\boxed{Your answer}"
DAPO_BEGINNING = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\n"
)
DAPO_ENDING = '\n\nRemember to put your answer on its own line after "Answer:".'


@dataclass(frozen=True)
class Problem:
    """One problem, without any instruction."""

    index: int
    """Its row in the set, from 0; rows left out count."""
    text: str
    answer: str


@dataclass(frozen=True)
class PublicSet:
    """Where a set is and how to read it."""

    source: str
    """Name for `datasets`, as in `data.train`."""
    split: str
    columns: tuple[str, ...]
    """Those that must be there."""
    text: Callable[[Row], Any]
    """The problem of a row."""
    answer: Callable[[Row], Any]
    """The reference answer of a row."""
    belongs: Callable[[Row], bool] = lambda row: True
    """Rows that are no problem of this set, such as code among mathematics, are left out without a word."""
    template: str = BOXED
    reward: Literal["math", "choice"] = "math"


def _user_message(row: Row, beginning: str = "", ending: str = "") -> str:
    """The last user message of verl's `prompt`, without the set's own instruction around the problem."""
    texts = [message["content"] for message in read_messages(row["prompt"]) if message["role"] == "user"]
    text = str(texts[-1]).strip()
    return text.removeprefix(beginning.strip()).removesuffix(ending.strip())


def _listed(value: Any) -> str:
    """OlympiadBench's answers: a list of LaTeX texts, or its Python source, as one text."""
    parts = ast.literal_eval(value) if isinstance(value, str) and value.startswith("[") else value
    parts = parts if isinstance(parts, list | tuple) else [parts]
    return ", ".join(text_of(part, "answer").strip().strip("$") for part in parts)


def _choices(row: Row) -> str:
    choices = [text_of(choice, "choice") for choice in row["choices"]]
    lines = [f"{chr(ord('A') + place)}. {choice}" for place, choice in enumerate(choices)]
    return "\n".join([text_of(row["question"], "problem"), "", *lines])


def _letter(row: Row) -> str:
    number = int(row["answer"])
    if not 0 <= number < len(row["choices"]):
        raise BrokenRecord("an answer that is none of the choices")
    return chr(ord("A") + number)


def _after_hashes(row: Row) -> str:
    _, hashes, answer = str(row["answer"]).rpartition("####")
    if not hashes:
        raise BrokenRecord("no #### in front of an answer")
    return answer.strip()


def _ground_truth(row: Row) -> Any:
    return as_dict(row["reward_model"])["ground_truth"]


def _column(name: str) -> Callable[[Row], Any]:
    return lambda row: row[name]


def _plain(source: str, split: str, text: str = "problem", answer: str = "answer") -> PublicSet:
    return PublicSet(source, split, (text, answer), _column(text), _column(answer))


def _gsm8k(split: str) -> PublicSet:
    return PublicSet("openai/gsm8k:main", split, ("question", "answer"), _column("question"), _after_hashes)


EVALUATION: Mapping[str, PublicSet] = {
    "gsm8k": _gsm8k("test"),
    "math500": _plain("HuggingFaceH4/MATH-500", "test"),
    "amc23": _plain("math-ai/amc23", "test", "question"),
    "aime24": _plain("HuggingFaceH4/aime_2024", "train"),
    "aime25": _plain("math-ai/aime25", "test"),
    "minerva": _plain("math-ai/minervamath", "test", "question"),
    "olympiadbench": PublicSet(
        "math-ai/olympiadbench",
        "test",
        ("question", "final_answer"),
        _column("question"),
        lambda row: _listed(row["final_answer"]),
        belongs=lambda row: row.get("modality") in (None, "Text-only"),
    ),
    "mmlu_stem": PublicSet(
        "TIGER-Lab/MMLU-STEM",
        "test",
        ("question", "choices", "answer"),
        _choices,
        _letter,
        template=LETTER,
        reward="choice",
    ),
}

TRAINING: Mapping[str, PublicSet] = {
    "gsm8k": _gsm8k("train"),
    "deepmath": _plain("zwhe99/DeepMath-103K", "train", "question", "final_answer"),
    "simplerl": PublicSet(
        "hkust-nlp/SimpleRL-Zoo-Data:simplelr_qwen_level3to5/train.parquet",
        "train",
        ("extra_info",),
        lambda row: row["extra_info"]["question"],
        lambda row: row["extra_info"]["answer"],
    ),
    "eurus": PublicSet(
        "PRIME-RL/Eurus-2-RL-Data",
        "train",
        ("prompt", "ability", "reward_model"),
        lambda row: _user_message(row, ending=EURUS_ENDING),
        _ground_truth,
        belongs=lambda row: row["ability"] == "math",
    ),
    "dapo-math": PublicSet(
        "BytedTsinghua-SIA/DAPO-Math-17k",
        "train",
        ("prompt", "reward_model"),
        lambda row: _user_message(row, DAPO_BEGINNING, DAPO_ENDING),
        _ground_truth,
    ),
}


def split_spec(spec: str, sets: Mapping[str, PublicSet]) -> tuple[str, str | None] | None:
    """(name, file or None) of `NAME` or `NAME=FILE`; None when it does not begin with the name of a public set."""
    name, equals, file = spec.partition("=")
    return (name, file if equals else None) if name in sets else None


def read_problems(spec: str, sets: Mapping[str, PublicSet], intake: Intake) -> dict[str, Problem]:
    """The problems of a public set in the order of its rows, each by its place for messages.

    Args:
        spec: `NAME` or `NAME=FILE`.
        sets: `EVALUATION` or `TRAINING`.
        intake: of the set; it counts the rows, and names those that are left out.

    Raises:
        ConfigError: when there is no such set, it cannot be read, lacks a column, or has no usable row.
    """
    key = intake.key
    parts = split_spec(spec, sets)
    if parts is None:
        raise ConfigError(f"{key}={spec!r} is not a public set; there are {', '.join(sets)}.")
    public = sets[parts[0]]
    try:
        rows = read_rows(parts[1] or public.source, public.split, intake)
    except ConfigError as error:
        if parts[1]:
            raise
        raise ConfigError(f"{error} Without a network, give a local copy: {parts[0]}=FILE.") from None
    columns = {column for _, row in rows for column in row}
    if rows and (missing := [column for column in public.columns if column not in columns]):
        raise ConfigError(
            f"{key}={spec!r} lacks the column {missing[0]} of {public.source}; it has {', '.join(sorted(columns))}."
        )
    problems = {}
    for index, (where, row) in enumerate(rows):
        if _is_foreign(public, row):
            continue
        problem = intake.attempt(where, _problem, public, index, row)
        if problem is not None:
            problems[where] = problem
    if not problems and not intake.left_out:
        raise ConfigError(f"{key}={spec!r} has no row with a problem and an answer as in {public.source}.")
    return problems


def _is_foreign(public: PublicSet, row: Row) -> bool:
    try:
        return not public.belongs(row)
    except Exception:  # what is wrong with the row is found when its problem is read
        return False


def _problem(public: PublicSet, index: int, row: Row) -> Problem:
    try:
        row = {column: plain(row[column]) for column in public.columns}
        text, answer = public.text(row), public.answer(row)
    except BrokenRecord:
        raise
    except Exception as error:  # the row has another shape than those of the set
        raise BrokenRecord(f"no problem or answer as in {public.source}", described(error)) from None
    if not isinstance(text, str):
        raise BrokenRecord("a problem that is not a text")
    return Problem(index, text_of(text, "problem").strip(), text_of(answer, "answer").strip())
