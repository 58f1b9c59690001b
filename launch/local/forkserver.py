"""A process without threads that has imported torch and Megatron-Core, and forks the ranks that run on CPU.

Importing takes seconds of CPU time; here it is paid once and not by every rank. Ranks on CUDA are spawned instead:
CUDA does not survive a fork, and libraries for it may touch it while they are imported.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing import forkserver, resource_tracker
from pathlib import Path

from launch.local.signals import WARNING, deferred
from parallel.errors import LaunchError

PRELOAD = ("launch.local.preload",)
"""Modules that the server imports."""

# One thread each: threads of a pool do not survive the fork, and a rank sets its own number afterwards.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

_ready: int | None = None
"""Process id of the server that has forked a process: one that still imports does not."""


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    before = dict(os.environ)
    # Python hands sys.path to the ranks, not to the server that preloads for them, and a preload that is not found
    # there is skipped silently: each rank would then import torch itself.
    os.environ.update(_ENVIRONMENT, PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def begin() -> None:
    """Start the server and return while it still imports. Does nothing when it already runs."""
    multiprocessing.set_forkserver_preload(list(PRELOAD))
    # The tracker unblocks SIGINT and SIGTERM as it starts, so it comes before these are deferred. SIGUSR1 would end it.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {WARNING})
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    # The server inherits the block: Ctrl-C in a terminal reaches every process, and only the parent shall act on it.
    with deferred(), _environment():
        forkserver.ensure_running()


def wait(timeout_s: float = 300) -> None:
    """Return once the server has imported everything. It can be interrupted, unlike starting a process.

    A server that was ready once is ready as long as it lives.

    Raises:
        LaunchError: the server died or took longer than `timeout_s`.
    """
    global _ready
    begin()
    if _ready is not None and _ready == _pid():
        return
    done: list[bool] = []

    def probe() -> None:
        process = multiprocessing.get_context("forkserver").Process(target=_nothing)
        with contextlib.suppress(EOFError, OSError):
            process.start()
            process.join()
            done.append(process.exitcode == 0)

    thread = threading.Thread(target=probe, name="forkserver-probe", daemon=True)
    try:
        thread.start()
        deadline = time.monotonic() + timeout_s
        while thread.is_alive() and time.monotonic() < deadline:
            thread.join(0.05)
    except BaseException:
        kill()  # or it would fork the probe, whose other end is gone
        raise
    if done != [True]:
        kill()
        raise LaunchError(
            "the process that starts ranks ended or hung while it imported torch and megatron-core",
            "try `python -c 'import moe_train.train'`, and see if this machine is out of memory",
        )
    _ready = _pid()


def is_running() -> bool:
    """Whether this process has started the server."""
    return getattr(forkserver._forkserver, "_forkserver_pid", None) is not None


def begin_on_cpu() -> None:
    """`begin` where this machine has no NVIDIA GPU: ranks on CUDA are not forked."""
    if not any(Path("/dev").glob("nvidia*")):
        begin()


def kill() -> None:
    """End the server now. Its ranks end with it."""
    global _ready
    _ready = None
    pid = _pid()
    if pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _pid() -> int | None:
    """Of the server, None before the first."""
    return getattr(forkserver._forkserver, "_forkserver_pid", None)


def _nothing() -> None:
    pass
