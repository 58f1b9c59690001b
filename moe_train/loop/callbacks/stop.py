"""Ends the run after a step, with a checkpoint, when a signal has asked for it."""

from __future__ import annotations

import signal

import torch
import torch.distributed as dist

from moe_train.loop.callbacks.checkpoint import CheckpointCallback
from moe_train.resilience import stop
from moe_train.run import Callback, Metrics, Run


class StopOnSignal(Callback):
    """SIGUSR1 and SIGTERM to any rank: after the step all ranks save (unless they just have) and raise `Stopped`.

    Ranks that `launch.local.launcher` started are ended by its SIGTERM, so there only SIGUSR1 counts.
    """

    def __init__(self, checkpoints: CheckpointCallback) -> None:
        self._checkpoints = checkpoints

    def on_start(self, run: Run) -> None:
        stop.listen(signal.SIGUSR1)
        if run.rank.launcher != "local":
            stop.listen(signal.SIGTERM)

    def on_step_end(self, run: Run, metrics: Metrics) -> None:
        # Every rank must know, and in the same step: a scheduler's signal reaches them at different times.
        requested = torch.tensor(float(bool(stop.requested_by())), device=run.device)
        dist.all_reduce(requested, op=dist.ReduceOp.MAX)
        if not requested.item() or run.state.step >= run.total_steps:
            return
        self._checkpoints.save(run)
        run.stopped_by = stop.requested_by() or "a signal to another rank"
        if run.is_main:
            print(f"stopped at step {run.state.step} by {run.stopped_by}; the same command continues", flush=True)
        raise stop.Stopped
