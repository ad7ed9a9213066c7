"""The one place where a record can fail: it is counted, named and left out, and the run ends when too many are."""

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from megatron_rl.config import ConfigError

log = logging.getLogger(__name__)

T = TypeVar("T")

Row = dict[str, Any]
Rows = list[tuple[str, Row]]
"""Each row with its place for messages, `file:line` or `name:row`."""

NAMED = 10  # so many records of a reason are named in a message, the rest are counted
REASONS = 5  # so many reasons, the most frequent first
LONGEST_REASON = 120  # characters

TOO_DEEP = "nested too deeply"


class BrokenRecord(ValueError):
    """Why one record cannot be used."""

    def __init__(self, reason: str, detail: str = "") -> None:
        """`reason` is the same for all records of its kind, so that they can be counted; `detail` is of this one."""
        super().__init__(reason)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class LeftOut:
    """A record that is not used."""

    where: str
    """`file:line` or `name:row`."""
    reason: str
    detail: str = ""


class Intake:
    """The records of one set as they are read, rendered and tokenized.

    Whatever is done to a single record is done by `attempt`.
    """

    def __init__(self, name: str, key: str, limit: str, max_left_out: float) -> None:
        """`name` is the set, `key` the config key or option that holds it, `max_left_out` the share in [0, 1] of its
        records that may be left out, and `limit` the key or option that says so."""
        self.name, self.key, self.limit, self.max_left_out = name, key, limit, max_left_out
        self.total = 0
        """Records seen, used or not."""
        self.left_out: list[LeftOut] = []

    def attempt(self, where: str, function: Callable[..., T], *arguments: object) -> T | None:
        """What `function` makes of a record, or None when it fails: then the record is left out."""
        try:
            return function(*arguments)
        except BrokenRecord as error:
            self.left_out.append(LeftOut(where, error.reason, error.detail))
        except RecursionError:
            self.left_out.append(LeftOut(where, TOO_DEEP))
        except Exception as error:  # whatever a user's data, template or type may raise
            self.left_out.append(LeftOut(where, described(error)))
        return None

    def reasons(self) -> str:
        """How many records are left out for which reason, and the first of each by name; empty when none is."""
        counts = Counter(record.reason for record in self.left_out)
        parts = []
        for reason, count in counts.most_common(REASONS):
            places = [record.where for record in self.left_out if record.reason == reason]
            more = f" and {count - NAMED} more" if count > NAMED else ""
            parts.append(f"{count} {reason}: {', '.join(places[:NAMED])}{more}")
        if len(counts) > REASONS:
            others = sum(count for _, count in counts.most_common()[REASONS:])
            parts.append(f"{others} for {len(counts) - REASONS} other reasons")
        return "; ".join(parts)

    def problem(self) -> str | None:
        """Why the set cannot be used: more is left out than may be, or all that there is; None when it can."""
        if not self.left_out:
            return None
        if len(self.left_out) >= self.total:
            return f"{self.key}={self.name!r}: none of {self.total} records can be used ({self.reasons()})."
        if len(self.left_out) / self.total <= self.max_left_out:
            return None
        return (
            f"{self.key}={self.name!r}: {len(self.left_out)} of {self.total} records cannot be used, and {self.limit}="
            f"{self.max_left_out:g} is the largest share that may be left out ({self.reasons()}); mend them, or raise "
            f"{self.limit}."
        )

    def conclude(self) -> None:
        """Log one warning that counts and names what is left out.

        Raises:
            ConfigError: when it is too much (see `problem`).
        """
        if (problem := self.problem()) is not None:
            raise ConfigError(problem)
        if self.left_out:
            log.warning("%d of %d records left out (%s)", len(self.left_out), self.total, self.reasons())


def described(error: Exception) -> str:
    """An exception as the reason of a record: its type and the beginning of its first line, as text that prints."""
    return printable(f"{type(error).__name__}: {first_line(error)}")


def first_line(error: Exception) -> str:
    """The first line of an exception's message, or its type when it has none."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".")


def printable(text: str, longest: int = LONGEST_REASON) -> str:
    """At most `longest` characters of a text in one line, those that cannot be encoded as escapes."""
    text = " ".join(text.split())
    text = text if len(text) <= longest else text[: longest - 3] + "..."
    return text.encode("utf-8", "backslashreplace").decode()
