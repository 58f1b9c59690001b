"""How far a stage of moe-data is: a bar with rate and remaining time on a terminal, a line a minute elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

_INTERVAL_S = 60.0


class StageProgress:
    """Progress of one stage.

    Args:
        name: of the stage.
        total: bytes of all its tasks.
        show: whether anything is shown.
        now: seconds of a monotonic clock.
    """

    def __init__(self, name: str, total: int, show: bool, now: Callable[[], float] = time.monotonic) -> None:
        console = Console(stderr=True)
        self._name, self._total, self._now = name, total, now
        self._lines = show and not console.is_terminal
        columns = (
            TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
            TimeRemainingColumn(),
        )  # fmt: skip
        self._bar = Progress(*columns, console=console, transient=True, disable=not (show and console.is_terminal))
        self._task = self._bar.add_task(name, total=total)
        self._began = self._told = now()
        self._done = self._own = 0

    def __enter__(self) -> StageProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def advance(self, size: int, resumed: bool = False) -> None:
        """Count `size` bytes as done.

        Args:
            resumed: they were done before this command began, so that they do not count for the rate.
        """
        self._done += size
        self._own += 0 if resumed else size
        self._bar.advance(self._task, size)
        if self._lines and self._now() - self._told >= _INTERVAL_S:
            self._told = self._now()
            print(self.line(), file=sys.stderr, flush=True)

    def line(self) -> str:
        """Share, rate and remaining time as text."""
        rate = self._own / max(self._now() - self._began, 1e-9)
        share = self._done / max(self._total, 1)
        text = f"{self._name}: {share:.0%} of {self._total / 1e6:,.0f} MB, {rate / 1e6:,.1f} MB/s"
        return f"{text}, {(self._total - self._done) / rate / 60:,.0f} min remaining" if rate else text
