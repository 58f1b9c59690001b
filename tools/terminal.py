"""Where tools print: as wide as the terminal, or wide enough for their tables in a file or a pipe."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.text import Text

from parallel.errors import one_line

_WIDTH = 160  # columns of a table that is written to a file: names of tensors, and of plans, are long


def console(**options: Any) -> Console:
    """A console on stdout with rich's own options."""
    return Console(width=None if sys.stdout.isatty() else _WIDTH, **options)


def printable(text: str) -> str:
    """Text of a model as a terminal may show it: with line breaks and tabs, without other controls of the terminal."""
    return "".join(c if c in "\n\t" or c.isprintable() else ascii(c)[1:-1] for c in text)


def literal(text: object) -> Text:
    """Text from a file as it may be shown: without markup, line breaks and terminal controls."""
    return Text(one_line(str(text)))
