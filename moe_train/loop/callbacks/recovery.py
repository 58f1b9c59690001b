"""What follows bad steps, which the step itself leaves out: a way back to a checkpoint, or the end of the run."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from moe_train.checkpoint import checkpoint
from moe_train.formats import run_directory
from moe_train.loop.callbacks.checkpoint import CheckpointCallback
from moe_train.resilience.bad_steps import DivergedError
from moe_train.run import Callback, Metrics, Run
from parallel.errors import CheckpointError

_REMEDY = "see its data, lower optimizer.lr, or raise resilience.max_bad_steps"


class Recovery(Callback):
    """Counts bad steps in a row, goes back when there are too many, and ends the run when that was done too often.

    After going back the run skips all data since that checkpoint, so no sample is used twice, and the data of the bad
    steps are not used again. The checkpoint is written again at once, with that position in the data, so that
    a crash does not undo it (`CheckpointCallback.on_rollback`).
    """

    def __init__(self, checkpoints: CheckpointCallback) -> None:
        self._checkpoints = checkpoints
        self._in_a_row, self._first_bad, self._rollbacks = 0, 0, 0

    def on_step_end(self, run: Run, metrics: Metrics) -> None:
        """Every rank has the same metrics and comes to the same end.

        Raises:
            DivergedError: `on_bad_step` or `max_rollbacks` says so, or there is no checkpoint to go back to.
        """
        reason = metrics.get("bad_step")
        if not reason:
            self._in_a_row = 0
            return
        self._first_bad = self._first_bad if self._in_a_row else run.state.step
        self._in_a_row += 1
        run.announce("skipped", reason=reason, in_a_row=self._in_a_row)
        settings = run.cfg.resilience
        if settings.on_bad_step == "stop":
            self._checkpoints.finish(run)
            raise DivergedError(f"step {run.state.step} is bad: {reason}", "see its data, or set on_bad_step=skip")
        if settings.on_bad_step == "rollback" or self._in_a_row >= settings.max_bad_steps:
            self._roll_back(run, reason)

    def _roll_back(self, run: Run, reason: str) -> None:
        self._checkpoints.finish(run)  # one that is still being written may be the one to go back to
        cause = f"steps {self._first_bad} to {run.state.step} are bad ({reason})"
        if self._rollbacks >= run.cfg.resilience.max_rollbacks:
            raise DivergedError(f"{cause} after {self._rollbacks} times back to a checkpoint", _REMEDY)
        bad_step, position = run.state.step, run.state.consumed_samples
        with run.clock.paused():
            if not _load_before(run, self._first_bad, self._checkpoints.own_steps):
                raise DivergedError(f"{cause}, and there is no checkpoint before them", _REMEDY)
            skipped = position - run.state.consumed_samples
            run.state.consumed_samples = position
        self._rollbacks += 1
        self._in_a_row = 0
        for callback in run.callbacks:
            callback.on_rollback(run)
        run.announce("rolled_back", reason=reason, from_step=bad_step, samples_skipped=skipped)


def _load_before(run: Run, step: int, own_steps: set[int]) -> bool:
    """Load the newest checkpoint of this run from before `step` that can be read; whether there is one."""
    paths: list[list[Path]] = [[]]
    if run.is_main:
        there = {run_directory.step_of(path.name): path for path in run_directory.candidates(checkpoint.root_of(run))}
        paths[0] = [there[own] for own in sorted(own_steps & there.keys(), reverse=True) if own < step]
    dist.broadcast_object_list(paths, src=0)
    before = run.cfg.resume
    for path in paths[0]:
        try:
            run.cfg.resume = str(path)
            checkpoint.resume(run)
            return True
        except CheckpointError as error:  # the same on every rank
            run.announce("damaged", checkpoint=str(path), reason=error.cause)
        finally:
            run.cfg.resume = before
    return False
