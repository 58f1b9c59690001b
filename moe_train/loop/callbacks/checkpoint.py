"""Saves checkpoints at an interval and after the last step."""

from __future__ import annotations

import time

from moe_train.checkpoint import checkpoint, exchange
from moe_train.loop.run import Callback, Metrics, Run


class CheckpointCallback(Callback):
    """Saves every `checkpoint.interval_steps` steps and, with `checkpoint.save_at_end`, after the last one; each once.
    With `export_hf` the last one is also written in Hugging Face format.

    Saving raises CheckpointError where the disk is full or not writable.
    """

    def __init__(self) -> None:
        self._saved_step = -1

    def on_step_end(self, run: Run, metrics: Metrics) -> None:
        """Save if this step is due. Not in `on_end`, which also runs after errors, when ranks no longer agree."""
        settings, step = run.cfg.checkpoint, run.state.step
        last = step >= run.total_steps and settings.save_at_end
        if last or (settings.interval_steps and step % settings.interval_steps == 0):
            self.save(run)

    def on_rollback(self, run: Run) -> None:
        """Save where the run went on, with its new place in the data: a crash must not undo what was decided."""
        self._saved_step = -1
        self.save(run)

    def save(self, run: Run) -> None:
        """Save the state after the current step, unless that was done already. Every rank calls it."""
        step = run.state.step
        if step == self._saved_step:
            return
        self._saved_step = step
        start = time.perf_counter()
        with run.clock.paused():  # no part of the time of a step
            path = checkpoint.save(run)
        if run.is_main:
            seconds, megabytes = time.perf_counter() - start, checkpoint.size_bytes(path) / 1e6
            print(f"checkpoint of step {step} in {path} ({megabytes:,.0f} MB, {seconds:.1f} s)", flush=True)
        if run.cfg.export_hf and step >= run.total_steps:
            exported = exchange.export(run, path)
            if run.is_main:
                print(f"Hugging Face weights in {exported}", flush=True)
