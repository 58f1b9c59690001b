"""Which published configurations fit the constants and which test them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import TypeVar

from tools.published.rows import Row

TEST_SHARE = 0.35
T = TypeVar("T")


def is_test(row: Row) -> bool:
    """Whether a row belongs to the test part. All rows of a configuration belong together, regardless of the release.

    The one step that is published by parts (DeepSeek-V3's, under DualPipe) is for fitting: its parts tell constants
    apart.
    """
    if row.schedule == "dualpipe":
        return False
    digest = hashlib.sha256(row.configuration.encode()).digest()
    return int.from_bytes(digest[:4], "big") / 2**32 < TEST_SHARE


def newest(published: Sequence[T], month: Callable[[T], int]) -> list[T]:
    """Of one layout, what was published with the newest release.

    Between two layouts the software is then as nearly the same as the table has it.
    """
    last = max(map(month, published))
    return [entry for entry in published if month(entry) == last]
