"""Straggler detection from the times that each rank measures of itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

_LEAST_SHARE = 0.1
"""Smallest excess of busy time over the median that counts, as a fraction of the step time."""


@dataclass(frozen=True)
class Straggler:
    """A rank that was slow in several intervals in a row."""

    rank: int
    measure: str
    """`busy time of a step` or `GEMM`."""
    seconds: float
    median_s: float
    """Of the ranks it is compared with."""


class StragglerDetector:
    """Counts intervals in which a rank is slow.

    Args:
        stages: pipeline stage of each rank.
        ratio: to the median of the other ranks, from which a rank is slow.
        intervals: in a row, after which it is named.
    """

    def __init__(self, stages: Sequence[int], ratio: float, intervals: int) -> None:
        self._stages, self._ratio, self._intervals = stages, ratio, intervals
        self._counts: Counter[tuple[int, str]] = Counter()

    def add_interval(self, times: Sequence[Sequence[float]]) -> list[Straggler]:
        """Ranks to name after one more interval.

        Args:
            times: of each rank its busy time of a step, the time of the fixed GEMM, and that of a whole step, s.
        """
        stragglers = []
        for rank, (own_s, gemm_s, step_s) in enumerate(times):
            peers = [times[r][0] for r, stage in enumerate(self._stages) if stage == self._stages[rank] and r != rank]
            others = [row[1] for r, row in enumerate(times) if r != rank]
            stragglers += self._count(
                Straggler(rank, "busy time of a step", own_s, _median(peers)), _LEAST_SHARE * step_s
            )
            stragglers += self._count(Straggler(rank, "GEMM", gemm_s, _median(others)), 0.0)
        return stragglers

    def _count(self, candidate: Straggler, least_s: float) -> list[Straggler]:
        key = (candidate.rank, candidate.measure)
        is_slow = (
            candidate.seconds > self._ratio * candidate.median_s and candidate.seconds - candidate.median_s > least_s
        )
        self._counts[key] = self._counts[key] + 1 if is_slow else 0
        if self._counts[key] < self._intervals:
            return []
        self._counts[key] = 0
        return [candidate]


def _median(values: Sequence[float]) -> float:
    return median(values) if values else float("inf")
