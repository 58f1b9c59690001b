"""How a config field carries its documentation and the bounds that can be checked without any other field."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from typing import Any


def doc(
    default: Any, text: str, *, choices: Sequence[str] = (), minimum: float | None = None, maximum: int | None = None
) -> Any:
    """A dataclass field with a one-line doc (and its unit), the strings it may hold, its smallest and largest value.

    `maximum` only guards against typos that would fill memory: it is far above any intended value.
    """
    metadata = {"doc": text, "choices": tuple(choices), "minimum": minimum, "maximum": maximum}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)
