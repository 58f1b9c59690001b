"""Ctrl-C and its relatives as one exception, raised only where the code can clean up."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

from moe_train.resilience import stop
from parallel.exit_codes import ExitCode

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals by which a terminal, a scheduler or a user ends a job."""
WARNING = signal.SIGUSR1
"""Signal by which a scheduler asks a job to save and end."""


class Interrupted(BaseException):
    """A signal requested the job's end. Not an Exception: nothing below `launch.main` may take it for a failed step."""

    def __init__(self, signum: int) -> None:
        self.signal = signal.Signals(signum)
        super().__init__(self.signal.name)

    @property
    def exit_code(self) -> int:
        """What a shell reports for a process that ended by this signal; for `WARNING` that the run can continue."""
        return ExitCode.SAVED if self.signal == WARNING else 128 + self.signal


_STORM_S = 10.0
"""Further signals so soon after one was raised are part of it: they would only tear apart how it is handled. Longer
than ranks take to end."""

_owner = 0  # the process that is interruptible
_raised_at = -_STORM_S
_held = 0
_pending: list[int] = []


def _on_signal(signum: int, frame: FrameType | None) -> None:
    if os.getpid() != _owner:  # a fork of this process has inherited the handler, and nobody there awaits Interrupted
        signal.signal(signum, signal.SIG_DFL)
        os.kill(os.getpid(), signum)
        return
    if _held:
        _pending.append(signum)
        return
    if time.monotonic() - _raised_at < _STORM_S:
        return
    # A pool of processes, such as one that tokenises, would first finish what it has begun.
    for child in multiprocessing.active_children():
        child.terminate()
    raise _interrupted(signum)


def _interrupted(signum: int) -> Interrupted:
    global _raised_at
    _raised_at = time.monotonic()
    return Interrupted(signum)


@contextmanager
def interruptible(last: bool = False) -> Iterator[None]:
    """Raise `Interrupted` in the main thread when a signal asks this process to end. Elsewhere nothing changes.

    A signal that this process inherited as ignored stays ignored: `nohup` ignores SIGHUP, and a shell without job
    control SIGINT in what it starts in the background. `WARNING` is always heard: the batch script ignores it on
    behalf of what it starts, until there is a handler.

    Args:
        last: the process ends with the block. `WARNING` then ends it too, and signals that follow the first are ignored
            after the block, so that they do not replace its exit code.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    global _owner, _raised_at
    _owner, _raised_at = os.getpid(), -_STORM_S
    heard = {number: signal.getsignal(number) for number in ENDING}
    after: dict[signal.Signals, Any] = {n: before for n, before in heard.items() if before is not signal.SIG_IGN}
    if last:
        after[WARNING] = signal.SIG_IGN
    for number in after:
        signal.signal(number, _on_signal)
    try:
        yield
    except Interrupted:
        if last:
            after = dict.fromkeys(after, signal.SIG_IGN)
        raise
    finally:
        for number, handler in after.items():
            signal.signal(number, handler)


@contextmanager
def warned(pids: Callable[[], Mapping[int, int]]) -> Iterator[None]:
    """Note `WARNING`, and pass it on to the processes of `pids`, by position; in the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def forward(signum: int, frame: FrameType | None) -> None:
        stop.request(signum)
        warn(pids())

    before = signal.signal(WARNING, forward)
    try:
        yield
    finally:
        signal.signal(WARNING, before)


def warn(pids: Mapping[int, int]) -> None:
    """Send `WARNING` to these processes."""
    for pid in pids.values():
        with suppress(ProcessLookupError):
            os.kill(pid, WARNING)


def leave(code: int) -> NoReturn:
    """End this process with `code`: what is to be done is done, and no signal may replace the exit code any more.

    Without this a signal would meet the interpreter as it ends, where its handlers are gone.
    """
    ignore()
    sys.exit(code)


def ignore() -> None:
    """From now on no signal that asks this process to end, or to save, has an effect. In the main thread only."""
    if threading.current_thread() is threading.main_thread():
        for number in (*ENDING, WARNING):
            signal.signal(number, signal.SIG_IGN)


@contextmanager
def deferred() -> Iterator[None]:
    """Hold signals back inside `interruptible`, for a few steps that must not be torn apart.

    Processes started here begin with these signals and `WARNING` blocked, so that none reaches them while they import.
    """
    global _held
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, (*ENDING, WARNING))
    # The mask holds for this thread only, and a signal may be delivered to a thread of a library.
    if not _held:
        _pending.clear()
    _held += 1
    try:
        yield
    finally:
        _held -= 1
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    if _pending and not _held:
        signum = _pending[0]
        _pending.clear()
        raise _interrupted(signum)
