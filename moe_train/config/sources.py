"""Names of texts: those that are trained on, and those whose loss is measured. No torch import."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from moe_train.config.schema import EvaluationSource, TextSource
from parallel.suggest import Fix, Impossible

_NAME = r"[\w.-]+"
_PREFIX = "text_document"
"""Name of the pair of files in every dataset of moe-data: its directory tells datasets apart."""


def names(field: str, sources: Sequence[EvaluationSource | TextSource]) -> list[str]:
    """A name for each of the entries of `field`, all different.

    Raises:
        Impossible: a name has characters that a metric cannot have, or two are the same.
    """
    found: list[str] = []
    for number, source in enumerate(sources):
        if source.name is not None and not re.fullmatch(_NAME, source.name):
            raise Impossible(
                f"{field}[{number}].name={source.name!r} has characters other than letters, digits, '.', '_' and '-'",
                _renamed(field, sources, number, _plain(source.name) or _of_path(source.path)),
            )
        name = source.name or _of_path(source.path)
        if name in found:
            numbers = itertools.count(2)
            free = next(other for i in numbers if (other := f"{name}_{i}") not in found)
            raise Impossible(f"{field} has two entries of the name {name}", _renamed(field, sources, number, free))
        found.append(name)
    return found


def _renamed(field: str, sources: Sequence[EvaluationSource | TextSource], number: int, name: str) -> list[Fix]:
    """The entries with another name for one of them."""
    return [{field: [*sources[:number], replace(sources[number], name=name), *sources[number + 1 :]]}]


def _of_path(path: str) -> str:
    """File or directory, without suffix."""
    last = Path(path)
    if last.name == _PREFIX:
        last = last.parent
    return _plain(last.name.partition(".")[0] or last.name) or "text"


def _plain(text: str) -> str:
    return re.sub(r"[^\w.-]+", "_", text).strip("_")
