"""How far the run is: a live line on a terminal, plain lines in a file."""

from __future__ import annotations

import sys
import time
from datetime import timedelta

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from moe_train.run import Callback, Metrics, Run
from moe_train.telemetry.registry import Place, metric, shown_in

_LIVE_S = 0.2
"""Shortest time between two drawings of the live line."""
_PLAIN_S = 5.0
"""Shortest time between two plain lines; a run with slower steps has one for each step."""


class Progress(Callback):
    """Shows step, losses, speed and time left on rank 0. Where the output is not a terminal it has no control codes."""

    def __init__(self) -> None:
        self._live: Live | None = None
        self._first_step, self._began, self._shown = 0, 0.0, 0.0
        self._speed: Metrics = {}  # of the newest logged step

    def on_start(self, run: Run) -> None:
        self._first_step, self._began = run.state.step, time.monotonic()
        if run.is_main and sys.stdout.isatty():
            # Drawn by the steps themselves: a thread that draws would take time from the ranks.
            self._live = Live(console=Console(), auto_refresh=False, transient=True)
            self._live.start()

    def on_step_end(self, run: Run, metrics: Metrics) -> None:
        if not run.is_main:
            return
        self._speed = metrics if "tokens_per_s" in metrics else self._speed
        first_or_last = run.state.step in (self._first_step + 1, run.total_steps)
        if first_or_last or time.monotonic() - self._shown >= (_LIVE_S if self._live else _PLAIN_S):
            self._show(run)

    def on_evaluation_end(self, run: Run, metrics: Metrics) -> None:
        if run.is_main and self._live is None:
            losses = [name for name in metrics if name.partition("/")[0] == "valid_loss"]
            parts = [f"{metric(name).label_of(name)} {metric(name).text(metrics[name])}" for name in losses]
            print(" | ".join([f"step {metrics['step']}/{run.total_steps}", *parts]), flush=True)

    def on_rollback(self, run: Run) -> None:
        self._first_step, self._began = run.state.step, time.monotonic()

    def on_end(self, run: Run) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _show(self, run: Run) -> None:
        self._shown = time.monotonic()
        parts = [f"step {run.state.step}/{run.total_steps}", *self._parts(run)]
        if self._live is None:
            print(" | ".join(parts), flush=True)
            return
        row = Table.grid(padding=(0, 1))
        row.add_column(no_wrap=True)
        row.add_column(no_wrap=True, overflow="ellipsis")
        bar = ProgressBar(total=run.total_steps, completed=run.state.step, width=20)
        row.add_row(bar, Text("  ".join(parts)))
        self._live.update(row, refresh=True)

    def _parts(self, run: Run) -> list[str]:
        newest = {**self._speed, **run.last_metrics}
        if run.evaluations:
            newest["valid_loss"] = run.evaluations[-1]["valid_loss"]
        rows = [row for row in shown_in(Place.PROGRESS) if row.progress and newest.get(row.name) is not None]
        parts = [row.progress.format(row.text(newest[row.name])) for row in rows]
        done = max(1, run.state.step - self._first_step)
        left = (time.monotonic() - self._began) / done * (run.total_steps - run.state.step)
        return [*parts, f"ETA {timedelta(seconds=round(left))}"]
