"""How a config field carries its documentation and the bounds that can be checked without any other field."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import MISSING, field
from typing import Any


def doc(
    default: Any,
    text: str,
    *,
    choices: Sequence[str] = (),
    minimum: float | None = None,
    maximum: int | None = None,
    example: str = "",
) -> Any:
    """A dataclass field with a one-line doc (and its unit), the strings it may hold, its smallest and largest value.

    Args:
        default: `REQUIRED` in an entry of a list that must have the field.
        maximum: only guards against typos that would fill memory: it is far above any intended value.
        example: of a list of entries, as on the command line.
    """
    metadata = {"doc": text, "choices": tuple(choices), "minimum": minimum, "maximum": maximum, "example": example}
    if default is REQUIRED:
        return field(metadata=metadata)
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: copy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


REQUIRED = MISSING
"""No default."""
