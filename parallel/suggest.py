"""Errors that come with values that would work. No torch import."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from parallel.errors import ConfigError

Fix = dict[str, Any]  # full field name -> value; all of them together make the configuration work


class Impossible(ConfigError):
    """A combination of values that cannot work, with candidate fixes, best first.

    Args:
        cause: the problem, beginning with the field's full name, with the arithmetic.
        fixes: candidates, best first; doubles are dropped, and the message shows the first two.
        otherwise: the remedy to show where no value can be named, such as a path only the user knows.
    """

    def __init__(self, cause: str, fixes: Sequence[Fix] = (), otherwise: str = "") -> None:
        self.fixes = list({repr(fix): fix for fix in fixes}.values())
        shown = " or ".join(describe(fix) for fix in self.fixes[:2])
        super().__init__(cause, f"use {shown}" if shown else otherwise)


def describe(fix: Fix) -> str:
    """The fix as Hydra overrides, to be pasted on the command line."""
    return " ".join(override(name, value) for name, value in fix.items())


def override(name: str, value: Any) -> str:
    """The override that gives a field this value, in quotes of the shell where it has entries in braces."""
    word = f"{name}={override_value(value)}"
    return shlex.quote(word) if "{" in word else word


def override_value(value: Any) -> str:
    """`value` in the syntax of a Hydra command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if is_dataclass(value) or isinstance(value, dict):
        return "{" + ",".join(f"{name}:{_in_entry(item)}" for name, item in _items(value)) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(override_value(v) for v in value) + "]"
    if isinstance(value, str) and (not value or "," in value or " " in value):
        return f"'{value}'"
    return str(value)


def _items(entry: Any) -> list[tuple[str, Any]]:
    """Names and values of a mapping, or of an entry of a list, without those that are as usual."""
    if isinstance(entry, dict):
        return list(entry.items())
    usual = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(entry)}
    return [(name, value) for name, value in vars(entry).items() if value != usual[name]]


def _in_entry(value: Any) -> str:
    """A value between braces. Double quotes, since single ones are around the word."""
    if not isinstance(value, str):
        return override_value(value)
    is_plain = value == value.strip() and value and value.lower() != "null" and not set(value) & set(",[]{}()'\"")
    # Backslashes count only before a quote.
    escaped = re.sub(r'(\\*)("|\Z)', lambda found: found[1] * 2 + ('\\"' if found[2] else ""), value)
    return value if is_plain else f'"{escaped}"'


def fixes_of(field: str, values: Iterable[Any]) -> list[Fix]:
    """One fix for each of `values` of `field`."""
    return [{field: value} for value in values]


def nearest(values: Iterable[int], wanted: int, minimum: int = 1) -> list[int]:
    """The distinct `values` >= `minimum` but not `wanted`, closest to it first, and the smaller first on a tie."""
    return sorted({v for v in values if v >= minimum and v != wanted}, key=lambda v: (abs(v - wanted), v))


def divisors(n: int) -> list[int]:
    """All divisors of `n` >= 1, ascending."""
    small = [d for d in range(1, int(n**0.5) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def multiples(n: int, wanted: int) -> list[int]:
    """The multiples of `n` around `wanted`, at least `n`."""
    below = max(wanted // n * n, n)
    return [below - n, below, below + n] if below > n else [n, 2 * n]
