"""Where tools print: as wide as the terminal, or wide enough for their tables in a file or a pipe."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console

_WIDTH = 160  # columns of a table that is written to a file: names of tensors, and of plans, are long


def console(**options: Any) -> Console:
    """A console on stdout with rich's own options."""
    return Console(width=None if sys.stdout.isatty() else _WIDTH, **options)
