"""Ctrl-C and its relatives as one exception, raised only where the code can clean up."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import FrameType

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals by which a terminal, a scheduler or a user ends a job."""


class Interrupted(BaseException):
    """The job was told to end. No Exception, so that nothing on the way to `launch.main` takes it for a failed step."""

    def __init__(self, signum: int) -> None:
        self.signal = signal.Signals(signum)
        super().__init__(self.signal.name)

    @property
    def exit_code(self) -> int:
        """What a shell reports for a process that ended by this signal."""
        return 128 + self.signal


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

    Args:
        last: the process ends with the block. Signals that follow the first are then ignored behind it, so that they
            do not take its exit code away.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    global _owner, _raised_at
    _owner, _raised_at = os.getpid(), -_STORM_S
    after = {number: signal.signal(number, _on_signal) for number in ENDING}
    try:
        yield
    except Interrupted:
        if last:
            after = dict.fromkeys(ENDING, signal.SIG_IGN)
        raise
    finally:
        for number, handler in after.items():
            signal.signal(number, handler)


@contextmanager
def forwarded(number: signal.Signals, pids: Callable[[], Mapping[int, int]]) -> Iterator[None]:
    """Pass this signal on to the processes of `pids`, by position; in the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def forward(signum: int, frame: FrameType | None) -> None:
        for pid in pids().values():
            with suppress(ProcessLookupError):
                os.kill(pid, signum)

    before = signal.signal(number, forward)
    try:
        yield
    finally:
        signal.signal(number, before)


@contextmanager
def deferred() -> Iterator[None]:
    """Hold signals back inside `interruptible`, for a few steps that must not be torn apart.

    Processes started here begin with these signals blocked, so that Ctrl-C does not reach them while they import.
    """
    global _held
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
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
