"""How integers may be written in every command: 2T, 14.8T, 100B, 8k, 2e12, 1_000. No torch import."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

SEQUENCE_FIELDS = (
    "train.seq_length",
    "model.max_position_embeddings",
    "model.yarn_original_max_position",
    "engine.context_length",
    "seq_length",  # of an entry of plan.recipe
)
"""Fields in which k is 1,024, as in "a context of 8k": lengths of sequences. Elsewhere it is 1,000."""

_LARGEST = 2**63 - 1
_UNITS = ("", "k", "m", "b", "t")
_NUMBER = re.compile(r"([+-]?(?:\d[\d_]*(?:\.\d*)?|\.\d+)(?:e[+-]?\d{1,3})?)([kmbt]?)", re.IGNORECASE)


def as_integer(text: str, thousand: int = 1000) -> int:
    """The integer that `text` means; `thousand` is what k multiplies by.

    Raises:
        ValueError: it is not a number, not a whole one, or has more than 63 bits.
    """
    match = _NUMBER.fullmatch(text.strip())
    if not match:
        raise ValueError(f"{text!r} is not a number")
    try:
        value = Decimal(match[1].replace("_", "")) * thousand ** _UNITS.index(match[2].lower())
    except InvalidOperation:
        raise ValueError(f"{text!r} is not a number") from None
    if value != int(value):
        raise ValueError(f"{text!r} is not a whole number")
    if abs(value) > _LARGEST:
        raise ValueError(f"{text!r} is too large a number")
    return int(value)
