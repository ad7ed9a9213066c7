"""Where output goes: the one place that makes rich's consoles.

A user's terminal has the width that it has. A pipe, a file or the log of a CI job has none, and rich would cut every
table to 80 columns there: cells broken over lines that neither people nor `grep` can read. So there tables take the
width that their contents need, and nothing but text is written.
"""

import os
import sys
from typing import TextIO

import rich.console

PLAIN_WIDTH = 400
"""Columns that a table may take where no terminal limits it."""

Terminal = rich.console.Console


def standard_output(file: TextIO | None = None) -> Terminal:
    """A rich console on standard output.

    Args:
        file: where to write instead.

    Returns:
        On a terminal, a console with its width and colors. Elsewhere one without control codes, as wide as `COLUMNS`
        says, or else `PLAIN_WIDTH`.
    """
    if (file or sys.stdout).isatty():
        return Terminal(file=file, highlight=False, emoji=False)
    columns = os.environ.get("COLUMNS", "")
    width = int(columns) if columns.isdecimal() else PLAIN_WIDTH
    # FORCE_COLOR, which CI jobs set, would bring progress bars along with the colors, line above line.
    return Terminal(file=file, highlight=False, emoji=False, force_terminal=False, width=width)
