"""Carries out the faults of `resilience.inject`. For tests and drills only: a run without any has no such callback."""

from __future__ import annotations

import logging
import math
import os
import signal
import threading
import time
from typing import Any

from megatron.core import parallel_state as ps
from torch import Tensor

from moe_train.config.resilience import Fault
from moe_train.resilience.inject import Once, is_due, touches
from moe_train.run import Callback, Metrics, Run

log = logging.getLogger(__name__)


class InjectFaults(Callback):
    """Must come before the callback that saves, so that what is due at the end of a step can meet its checkpoint."""

    def __init__(self) -> None:
        self._faults: list[Fault] = []
        self._once: Once | None = None
        self._hooks: list[Any] = []

    def on_start(self, run: Run) -> None:
        self._faults = run.cfg.resilience.inject
        self._once = Once(run.run_dir, run.rank.rank)

    def on_step_begin(self, run: Run) -> None:
        self._act(run, run.state.step + 1, "begin")
        first = run.state.consumed_samples
        for fault in self._faults:
            if touches(fault, run.rank.rank, first, first + run.batch_size()):
                self._change_loss(run, fault)

    def on_step_end(self, run: Run, metrics: Metrics) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._act(run, run.state.step, "end")

    def _act(self, run: Run, step: int, at: str) -> None:
        for number, fault in enumerate(self._faults):
            if is_due(fault, run.rank.rank, step, at) and self._once and self._once.claim(number, fault.steps):
                log.warning("injected: %s", fault)
                self._do(run, fault)

    def _do(self, run: Run, fault: Fault) -> None:
        if fault.kind in ("kill", "stop"):
            number = signal.SIGKILL if fault.kind == "kill" else signal.SIGSTOP
            if fault.after:
                threading.Timer(fault.after, os.kill, (os.getpid(), number)).start()
            else:
                os.kill(os.getpid(), number)
        elif fault.kind == "hang":
            while True:
                time.sleep(1)
        elif fault.kind == "raise":
            raise RuntimeError("injected error")
        elif fault.kind == "term":
            for _ in range(round(fault.factor)):
                os.kill(os.getpid(), signal.SIGUSR1)
                if run.rank.launcher != "local":
                    os.kill(os.getpid(), signal.SIGTERM)
        elif fault.kind == "slow":
            self._hook(run, lambda *_: time.sleep(fault.seconds))
        else:
            self._change_loss(run, fault)

    def _change_loss(self, run: Run, fault: Fault) -> None:
        factor = math.nan if fault.kind == "nan" else fault.factor

        def times(module: Any, inputs: Any, losses: Tensor) -> Tensor:
            return losses * factor

        if ps.is_pipeline_last_stage():
            self._hook(run, times)

    def _hook(self, run: Run, hook: Any) -> None:
        self._hooks.append(run.chunks[-1].register_forward_hook(hook))
