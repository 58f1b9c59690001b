"""The time of optimizer steps, without what is done between them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class StepClock:
    """Measures laps. A lap is one optimizer step with its logging; evaluation and checkpoints run in `paused()`."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._began: float | None = None
        self._paused_s = 0.0
        self.is_paused = False
        self.total_paused_s = 0.0
        self._laps: list[float] = []  # [first, sum of the others]; the first includes warm-up
        self._later = 0

    def start(self) -> None:
        """Begin the first lap now."""
        self._began, self._paused_s = self._now(), 0.0

    def lap(self) -> float:
        """Seconds of the lap that ends now, pauses left out. The next lap begins.

        Raises:
            RuntimeError: the clock was not started.
        """
        if self._began is None:
            raise RuntimeError("StepClock.lap before StepClock.start")
        now = self._now()
        seconds = now - self._began - self._paused_s
        self._began, self._paused_s = now, 0.0
        if not self._laps:
            self._laps = [seconds, 0.0]
        else:
            self._laps[1] += seconds
            self._later += 1
        return seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of the `with` block out of the current lap. Not to be nested."""
        began = self._now()
        self.is_paused = True
        try:
            yield
        finally:
            self.is_paused = False
            pause_s = self._now() - began
            self._paused_s += pause_s
            self.total_paused_s += pause_s

    @property
    def mean_s(self) -> float | None:
        """Mean seconds of the laps after the first, which warms up; of the first if it is the only one, else None."""
        if not self._laps:
            return None
        return self._laps[1] / self._later if self._later else self._laps[0]
