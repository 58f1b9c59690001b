"""Ctrl-C and its relatives as one exception, raised only where the code can clean up."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
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


_owner = 0  # the process that is interruptible
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
    # A pool of processes, such as one that tokenises, would first finish what it has begun.
    for child in multiprocessing.active_children():
        child.terminate()
    raise Interrupted(signum)


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise `Interrupted` in the main thread when a signal asks this process to end. Elsewhere nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    global _owner
    _owner = os.getpid()
    before = {number: signal.signal(number, _on_signal) for number in ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
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
        raise Interrupted(signum)
