"""Faults that a drill injects: when one is due, and that each happens once in a run directory."""

from __future__ import annotations

import os
from pathlib import Path

from moe_train.config.resilience import Fault


def is_due(fault: Fault, rank: int, step: int, at: str) -> bool:
    """Whether a fault of a step happens on `rank`, `at` the begin or end of `step`."""
    inside = fault.step <= step < fault.step + fault.steps
    return fault.rank in (-1, rank) and fault.sample < 0 and fault.at == at and inside


def touches(fault: Fault, rank: int, first: int, end: int) -> bool:
    """Whether a fault of samples is in those from `first` to before `end`, on `rank`."""
    return fault.rank in (-1, rank) and 0 <= fault.sample < end and first < fault.sample + fault.samples


class Once:
    """Claims faults for this process, so that one that ended a run does not end it again."""

    def __init__(self, run_dir: Path, rank: int) -> None:
        self._directory, self._rank = run_dir / "injected", rank
        self._left: dict[int, int] = {}

    def claim(self, number: int, times: int = 1) -> bool:
        """Whether fault `number` may happen now: at most `times` times in the process that was first."""
        if number not in self._left:
            self._directory.mkdir(parents=True, exist_ok=True)
            try:
                marker = os.open(self._directory / f"{number}_rank_{self._rank}", os.O_CREAT | os.O_EXCL)
            except FileExistsError:
                self._left[number] = 0
            else:
                os.fsync(marker)
                os.close(marker)
                self._left[number] = times
        self._left[number] -= 1
        return self._left[number] >= 0
