"""What a started process does before, around and after the code of its rank."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import importlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import connection
from typing import IO, Any

from launch import env, failures, quiet, streams
from launch.local import signals
from moe_train.config.schema import Config
from moe_train.resilience import stop
from parallel.errors import LaunchError
from parallel.rank_info import RankInfo

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class Setup:
    """How a started process is set up."""

    rank: int
    environment: dict[str, str]
    """All of it: a forked process has the environment that the fork server started with."""
    threads: int
    log: str
    """File for the traceback, and for the output if `own_terminal` is false."""
    error_file: str
    own_terminal: bool
    cores: set[int] | None = None
    """Those that it stays on; None: all that the launcher may use."""


def enter(setup: Setup, work: Callable[..., None], args: tuple[Any, ...]) -> None:
    """Run `work(*args)` in this process, which the launcher has started, and leave an error for it to read."""
    _end_with_parent()
    # A terminal sends Ctrl-C and its end to every process; only the parent acts on it, and ends its ranks by SIGTERM.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    stop.listen(signals.WARNING)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (*signals.ENDING, signals.WARNING))
    os.environ.clear()
    os.environ.update(setup.environment)
    env.settle(setup.cores)
    log = open(setup.log, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 - open as long as the process lives
    with contextlib.suppress(OSError):  # a full disk
        log.write(f"--- rank {setup.rank}, process {os.getpid()}, {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
    faulthandler.disable()  # else it would not set handlers again that a parent has reset
    faulthandler.enable(log)
    if not setup.own_terminal:
        _redirect_output(log)
    streams.tolerate()
    quiet.silence()
    code = 0
    try:
        use_threads(setup.threads)
        work(*args)
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    except BaseException as error:
        with contextlib.suppress(OSError):
            failures.record(error, setup.error_file)
        with contextlib.suppress(OSError):
            traceback.print_exception(error, file=log)
        code = failures.exit_code_of(error)
    signal.signal(signals.WARNING, signal.SIG_IGN)  # the handlers of a spawned process are gone while it ends
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        os._exit(code)  # a thread of a broken communicator could keep the process alive


def train(config_path: str, entry: str, rank: RankInfo) -> None:
    """Call `entry` ("module:function") with the config at `config_path` and this rank; leave the process groups."""
    from moe_train.config.composition.compose import from_yaml
    from parallel.runtime.imports import without_compilation

    cfg = from_yaml(config_path)
    on_gpu = cfg.runtime in ("auto", "cuda")
    with contextlib.nullcontext() if on_gpu else without_compilation():
        function = load(entry)
    function(cfg, rank)
    leave_groups()


def load(entry: str) -> Callable[[Config, RankInfo], None]:
    """The function named by "module:function".

    Raises:
        LaunchError: the module has no such function.
    """
    module, _, name = entry.partition(":")
    function = getattr(importlib.import_module(module), name, None)
    if not callable(function):
        raise LaunchError(f"{entry!r} has no such function", "write it as module:function")
    return function


def leave_groups() -> None:
    """Destroy the process groups that are left, so that libraries do not warn about them."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def use_threads(count: int) -> None:
    """Compute with `count` threads in the calling thread of this process."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(count)  # for a library that is loaded later, and for processes started from here
    from parallel.runtime import threads

    threads.use_threads(count)


def _redirect_output(log: IO[str]) -> None:
    # On the level of file descriptors, because libraries in C++ print too.
    for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
        stream.flush()
        os.dup2(log.fileno(), number)
        with contextlib.suppress(AttributeError):
            stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]


def _end_with_parent() -> None:
    """End this process when the one that started it is gone, even by SIGKILL and even if this process is busy."""
    if sys.platform == "linux":
        # The parent of a forked rank is the fork server, which ends when the launcher and its ranks are gone.
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    launcher = multiprocessing.parent_process()
    if launcher is None:
        return
    sentinel = launcher.sentinel

    def watch() -> None:
        connection.wait([sentinel])
        os.kill(os.getpid(), signal.SIGKILL)

    with contextlib.suppress(RuntimeError):  # no thread can be started: what the kernel does must be enough
        threading.Thread(target=watch, name="parent-watch", daemon=True).start()
