"""Saves checkpoints at an interval and after the last step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from moe_train.checkpoint import checkpoint, hf_exchange
from moe_train.checkpoint.collective import say, warn
from moe_train.checkpoint.saving import Saving
from moe_train.run import Callback, Metrics, Run
from parallel.errors import CheckpointError


class CheckpointCallback(Callback):
    """Saves every `checkpoint.interval_steps` steps, unless that step was bad, and, with `checkpoint.save_at_end`,
    after the last one; each once. With `export_hf` the last one is also written in Hugging Face format.

    With `checkpoint.asynchronous` (async save) those between are written while training continues. One that cannot be
    written (a full disk) is a warning. `checkpoint.max_consecutive_failures` of them in a row are a CheckpointError on
    every rank in the same step.
    """

    def __init__(self) -> None:
        self._saved_step = -1
        self._saving: Saving | None = None
        self._failed, self._held_s = 0, 0.0
        self.own_steps: set[int] = set()
        """Steps of the checkpoints that this run wrote or continues. A used directory may hold others."""

    def on_start(self, run: Run) -> None:
        """The run continues a checkpoint, unless it begins."""
        root, resume = checkpoint.root_of(run).resolve(), run.cfg.resume
        if resume == "auto" or Path(resume).resolve().is_relative_to(root):
            self.own_steps.add(run.state.step)

    def on_step_end(self, run: Run, metrics: Metrics) -> None:
        """Save if this step is due. Not in `on_end`, which also runs after errors, when ranks no longer agree."""
        settings, step = run.cfg.checkpoint, run.state.step
        last = step >= run.total_steps
        if last and settings.save_at_end:
            self.save(run)
            return
        self._tolerate(run, lambda: self._go_on(run))
        due = settings.interval_steps and step % settings.interval_steps == 0 and step != self._saved_step
        if due and not metrics.get("bad_step"):  # going back needs those from before the bad steps
            self.finish(run)
            self._tolerate(run, lambda: self._begin(run, copy=settings.asynchronous))
        if last or not settings.asynchronous:
            self.finish(run)

    def on_rollback(self, run: Run) -> None:
        """Save after a rollback, with the new position in the data: a crash must not undo the skip."""
        self._saved_step = -1
        self.own_steps = {step for step in self.own_steps if step <= run.state.step}
        self.save(run)

    def save(self, run: Run) -> None:
        """Have the state after the current step on disk when this returns. Every rank calls it.

        Raises:
            CheckpointError: it cannot be written.
        """
        if run.state.step != self._saved_step:
            self._tolerate(run, lambda: self._wait(run), always=True)
            self._begin(run, copy=False)
        self._wait(run)
        if run.state.step >= run.total_steps:
            with self._holding(run):
                hf_exchange.export_last(run)

    def finish(self, run: Run) -> None:
        """Wait for the checkpoint that is being written, if there is one. Every rank calls it.

        Raises:
            CheckpointError: it failed, as the last of `checkpoint.max_consecutive_failures` in a row.
        """
        self._tolerate(run, lambda: self._wait(run))

    def on_end(self, run: Run) -> None:
        """After an error a checkpoint may be in flight. It needs all ranks, and is discarded."""
        if self._saving is not None:
            self._saving.abandon()
            if run.is_main:
                warn(f"the checkpoint of step {self._saved_step} was not completed")

    def _begin(self, run: Run, *, copy: bool) -> None:
        self._held_s = 0.0
        with self._holding(run):
            self._saving = checkpoint.begin(run, copy=copy)
        self._saved_step = run.state.step

    def _go_on(self, run: Run) -> None:
        if self._saving is not None:
            with self._holding(run):
                done = self._saving.advance()
            if done:
                self._report(run, self._saving)

    def _wait(self, run: Run) -> None:
        if self._saving is not None:
            with self._holding(run):
                self._saving.wait()
            self._report(run, self._saving)

    def _report(self, run: Run, saved: Saving) -> None:
        self._saving, self._failed = None, 0
        self.own_steps.add(saved.job.step)
        if run.is_main:
            job, waited = (
                saved.job,
                f", training waited {self._held_s:.1f} s" if run.cfg.checkpoint.asynchronous else "",
            )
            size = f"{job.bytes / 1e6:,.0f} MB, {saved.seconds:.1f} s"
            say(f"checkpoint of step {job.step} in {job.final} ({size}{waited})")

    def _tolerate(self, run: Run, action: Callable[[], None], *, always: bool = False) -> None:
        """Do `action`. If it fails, warn; unless it is one time too many, and that is not to be borne `always`."""
        try:
            action()
        except CheckpointError as error:
            self._saving, self._saved_step = None, -1
            self._failed += 1
            limit = run.cfg.checkpoint.max_consecutive_failures
            if self._failed >= limit and not always:
                raise
            if run.is_main:
                warn(f"{error} (not saved; {self._failed} in a row, and checkpoint.max_consecutive_failures={limit})")

    @contextmanager
    def _holding(self, run: Run) -> Iterator[None]:
        """Training waits: no part of the time of a step."""
        began = time.perf_counter()
        try:
            with run.clock.paused():
                yield
        finally:
            self._held_s += time.perf_counter() - began
