"""Rank processes under torch elastic's process context: they end together, quickly, and leave nothing behind."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from typing import Any

from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs, PContext, ProcessFailure, RunProcsResult

from launch import failures
from launch.local import forkserver, rank, signals
from moe_train.resilience import stop

GRACE_S = 2
"""From SIGTERM to SIGKILL, seconds."""
_POLL_S = 0.05
"""How often signals and the time limit are looked at; the end of a rank is noticed at once."""
_SETTLE_S = 1.0
"""How long the first failure may wait for one that explains it: ranks that lost a peer can be seen before the peer."""


class _Logs(LogsSpecs):
    """Ranks open their own log, so that output and tracebacks of one rank are one file."""

    def __init__(self, setups: Sequence[rank.Setup]) -> None:
        super().__init__()
        self._setups = setups

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        logs = {i: setup.log for i, setup in enumerate(self._setups)}
        return LogsDest(logs, logs, error_files={i: setup.error_file for i, setup in enumerate(self._setups)})

    @property
    def root_log_dir(self) -> str:
        return os.path.dirname(self._setups[0].log)


class RankProcesses(PContext):
    """Processes that each run `work(*args[i])` as `setups[i]` says.

    torch's own contexts wait up to 30 s for a rank that ignores SIGTERM and report one failure of several; this one
    waits `GRACE_S` and reports all of them, so that the first can be found.
    """

    def __init__(
        self, work: Callable[..., None], args: Sequence[tuple[Any, ...]], setups: Sequence[rank.Setup], forked: bool
    ) -> None:
        environments = {i: setup.environment for i, setup in enumerate(setups)}
        super().__init__("rank", work, dict(enumerate(args)), environments, _Logs(setups))
        self._work, self._setups, self._forked = work, setups, forked
        self._processes: list[BaseProcess] = []
        self._failed_at: float | None = None
        self.failures: list[failures.Failure] = []

    def run(self, timeout_s: float = -1) -> None:
        """Start the processes and return when all have succeeded. No process outlives the call.

        Raises:
            RankError: a rank failed.
            SystemExit: all ranks exited early by agreement, with one of `exit_codes.COLLECTIVE`.
            TimeoutError: some still ran after `timeout_s` seconds; a negative number means no limit.
            Interrupted: a signal told this process to end.
        """
        for setup in self._setups:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(setup.error_file)  # of an earlier run in the same directory
        with signals.interruptible(), signals.warned(self.pids):
            if self._forked:
                forkserver.wait()
            try:
                with signals.deferred():
                    self.start()
                if stop.requested_by():  # before these ranks were there
                    signals.warn(self.pids())
                result = self.wait(timeout_s)
            finally:
                with signals.deferred():
                    self.close(timeout=GRACE_S)
        if result is None:
            raise TimeoutError(f"{self.nprocs} processes took longer than {timeout_s:g} s")
        if self.failures:
            first = min(self.failures, key=lambda failure: failure.order)
            if first.agreed:
                raise SystemExit(first.exit_code)
            raise failures.RankError(first)

    def start(self) -> None:
        """Start. Signals stay with `launch.local.signals`: torch's handlers raise what `except Exception` catches."""
        self._start()

    def pids(self) -> dict[int, int]:
        """Process ids by position."""
        return {i: process.pid for i, process in enumerate(self._processes) if process.pid is not None}

    def _start(self) -> None:
        context: Any = multiprocessing.get_context("forkserver" if self._forked else "spawn")
        for i, setup in enumerate(self._setups):
            target = (setup, self._work, self.args[i])
            process = context.Process(target=rank.enter, args=target, name=f"rank {setup.rank}")
            process.start()
            self._processes.append(process)

    def wait(self, timeout: float = -1, period: float = _POLL_S) -> RunProcsResult | None:
        """As torch's own, which sleeps for `period` seconds where this one also returns when a process ends."""
        expiry = time.monotonic() + timeout if timeout >= 0 else math.inf
        while True:
            result = self._poll()
            if result or time.monotonic() >= expiry:
                return result
            running = [process.sentinel for process in self._processes if process.is_alive()]
            if running:
                connection.wait(running, period)

    def _poll(self) -> RunProcsResult | None:
        codes = [process.exitcode for process in self._processes]
        failed = [i for i, code in enumerate(codes) if code]
        if not failed:
            done = all(code == 0 for code in codes)
            return RunProcsResult(return_values=dict.fromkeys(range(self.nprocs))) if done else None
        self._failed_at = self._failed_at or time.monotonic()
        failures = [self._failure(self._setups[i], codes[i] or 0) for i in failed]
        settled = None not in codes or time.monotonic() > self._failed_at + _SETTLE_S
        if not settled and not any(failure.is_cause for failure in failures):
            return None
        self.failures = failures  # now, because `close` will make every other rank look killed
        return RunProcsResult(failures={i: self._as_elastic(i, codes[i] or 0) for i in failed})

    @staticmethod
    def _failure(setup: rank.Setup, code: int) -> failures.Failure:
        return failures.read(setup.rank, code, setup.error_file, setup.log)

    def _as_elastic(self, i: int, code: int) -> ProcessFailure:
        pid = self._processes[i].pid or 0
        return ProcessFailure(local_rank=i, pid=pid, exitcode=code, error_file=self._setups[i].error_file)

    def _close(self, death_sig: signal.Signals, timeout: int = GRACE_S) -> None:
        for number, grace_s in ((death_sig, timeout), (signal.SIGKILL, 1)):
            alive = [process for process in self._processes if process.is_alive()]
            for process in alive:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid or 0, number)
            deadline = time.monotonic() + grace_s
            for process in alive:
                process.join(max(0.0, deadline - time.monotonic()))
