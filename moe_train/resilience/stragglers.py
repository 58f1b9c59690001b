"""Straggler detection from the times that each rank measures of itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

_LEAST_SHARE = 0.1
"""Smallest excess of busy time over the median that counts, as a fraction of the step time."""


@dataclass(frozen=True)
class Slow:
    """A rank that was slow in several intervals in a row."""

    rank: int
    what: str
    """`busy time of a step` or `GEMM`."""
    seconds: float
    median_s: float
    """Of the ranks it is compared with."""


class Judge:
    """Counts intervals in which a rank is slow.

    Args:
        stages: pipeline stage of each rank.
        ratio: to the median of the other ranks, from which a rank is slow.
        intervals: in a row, after which it is named.
    """

    def __init__(self, stages: Sequence[int], ratio: float, intervals: int) -> None:
        self._stages, self._ratio, self._intervals = stages, ratio, intervals
        self._counts: Counter[tuple[int, str]] = Counter()

    def slow(self, times: Sequence[Sequence[float]]) -> list[Slow]:
        """Ranks to name after one more interval.

        Args:
            times: of each rank its busy time of a step, the time of the fixed GEMM, and that of a whole step, s.
        """
        found = []
        for rank, (own_s, product_s, step_s) in enumerate(times):
            peers = [times[r][0] for r, stage in enumerate(self._stages) if stage == self._stages[rank] and r != rank]
            others = [row[1] for r, row in enumerate(times) if r != rank]
            found += self._count(Slow(rank, "busy time of a step", own_s, _median(peers)), _LEAST_SHARE * step_s)
            found += self._count(Slow(rank, "GEMM", product_s, _median(others)), 0.0)
        return found

    def _count(self, one: Slow, least_s: float) -> list[Slow]:
        key = (one.rank, one.what)
        is_slow = one.seconds > self._ratio * one.median_s and one.seconds - one.median_s > least_s
        self._counts[key] = self._counts[key] + 1 if is_slow else 0
        if self._counts[key] < self._intervals:
            return []
        self._counts[key] = 0
        return [one]


def _median(values: Sequence[float]) -> float:
    return median(values) if values else float("inf")
