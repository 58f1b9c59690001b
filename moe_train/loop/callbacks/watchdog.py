"""Ends this rank when it makes no progress, and compares the speed of ranks."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from moe_train.config.resolve import hang_timeout_s
from moe_train.loop.callbacks.checkpoint import CheckpointCallback
from moe_train.resilience import stragglers
from moe_train.resilience.watch import Watch
from moe_train.run import Callback, Metrics, Run
from parallel.exit_codes import ExitCode

_GEMM_SIZE = {"cpu": 256, "cuda": 4096}
"""Rows and columns of the matrices of the fixed GEMM, which takes milliseconds."""


class Watchdog(Callback):
    """Starts the thread that watches this rank. Comes first, so that what other callbacks do is watched too."""

    def __init__(self) -> None:
        self.watch: Watch | None = None
        self._first_step = 0

    def on_start(self, run: Run) -> None:
        settings = run.cfg.resilience
        within_step = hang_timeout_s(run.cfg)
        self._first_step = run.state.step

        def limit_s() -> float:
            slow = run.clock.is_paused or run.state.step == self._first_step
            return max(settings.first_step_timeout_s, within_step) if slow and within_step else within_step

        if within_step or settings.straggler_interval_steps:
            self.watch = Watch(
                run.pulse, run.run_dir, run.rank.rank, run.layout.world_size, limit_s, lambda: not run.clock.is_paused
            )
            self.watch.start()

    def on_step_end(self, run: Run, metrics: Metrics) -> None:
        run.pulse.mark(run.state.step, "callbacks")

    def on_end(self, run: Run) -> None:
        if self.watch is not None:
            self.watch.stop()
            self.watch = None


class Stragglers(Callback):
    """Straggler detection: reports ranks that keep the others waiting, and ends the run if `straggler_action` is stop.

    Two times are compared. Busy time: the share of the watchdog's samples in which the rank did not wait for others,
    times the step time, compared within a pipeline stage. And the time of a fixed GEMM, compared over all ranks. On a
    GPU only the second one detects a slow rank, because Python does not see the waiting there.
    """

    def __init__(self, watchdog: Watchdog, checkpoints: CheckpointCallback) -> None:
        self._watchdog, self._checkpoints = watchdog, checkpoints
        self._detector: stragglers.StragglerDetector | None = None
        self._steps, self._began, self._paused_s = 0, 0.0, 0.0

    def on_start(self, run: Run) -> None:
        settings = run.cfg.resilience
        stages = [run.layout.coordinates(rank).pp for rank in range(run.layout.world_size)]
        self._detector = stragglers.StragglerDetector(stages, settings.straggler_ratio, settings.straggler_intervals)

    def on_step_end(self, run: Run, metrics: Metrics) -> None:
        if self._steps == 0:  # the first step after a start, which compiles, is in no interval
            self._begin(run)
            return
        self._steps += 1
        if self._steps <= run.cfg.resilience.straggler_interval_steps:
            return
        share = self._watchdog.watch.busy_fraction() if self._watchdog.watch else None
        elapsed_s = time.monotonic() - self._began - (run.clock.total_paused_s - self._paused_s)
        step_s = elapsed_s / (self._steps - 1)
        times = torch.zeros(run.layout.world_size, 3, dtype=torch.float64, device=run.device)
        mine = [(1.0 if share is None else share) * step_s, gemm_s(run.device), step_s]
        times[run.rank.rank] = torch.tensor(mine, dtype=torch.float64)
        dist.all_reduce(times)  # the sum of tables that are zero in all other rows
        if self._detector and (slow_ranks := self._detector.add_interval(times.tolist())):
            self._report(run, slow_ranks)
        self._begin(run)

    def _begin(self, run: Run) -> None:
        if self._watchdog.watch is not None:
            self._watchdog.watch.busy_fraction()
        self._steps, self._began, self._paused_s = 1, time.monotonic(), run.clock.total_paused_s

    def _report(self, run: Run, slow_ranks: list[stragglers.Straggler]) -> None:
        import socket

        hosts = [""] * run.layout.world_size
        dist.all_gather_object(hosts, socket.gethostname())
        for slow in slow_ranks:
            run.announce(
                "straggler", rank=slow.rank, host=hosts[slow.rank], what=slow.measure,
                seconds=round(slow.seconds, 6), median_s=round(slow.median_s, 6),
            )  # fmt: skip
        if run.cfg.resilience.straggler_action == "stop" and run.state.step < run.total_steps:
            self._checkpoints.save(run)
            nodes = sorted({hosts[slow.rank].partition(".")[0] for slow in slow_ranks})
            run.stopped_by = f"slow nodes {','.join(nodes)}"
            if run.is_main:
                print(f"stopped at step {run.state.step}; exclude: {','.join(nodes)}", flush=True)
            raise SystemExit(ExitCode.BAD_NODE)


def gemm_s(device: torch.device, repetitions: int = 5) -> float:
    """Seconds of a fixed GEMM on `device`, the best of a few."""
    size = _GEMM_SIZE[device.type]
    matrix = torch.ones(size, size, device=device, dtype=torch.float32 if device.type == "cpu" else torch.bfloat16)
    best = float("inf")
    for _ in range(repetitions):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        matrix @ matrix
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return best
