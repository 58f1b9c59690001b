"""Runs commands in forks of one process that has imported what most commands need: torch and Megatron-Core take 3 s of
processor time in each process that imports them itself. `tests.forked` starts it and tells it what to run.

A fork begins with nothing of the server but its modules. It gets the arguments, environment, directory, files, process
group and signals that a new process would have. The launcher's own fork server, too, is a fork, and has these modules,
as does the fork server that starts the ranks of tests.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import io
import os
import pickle
import runpy
import selectors
import signal
import socket
import struct
import sys
import tempfile
import threading
import traceback
import weakref
from collections.abc import Callable, Sequence
from multiprocessing import util
from pathlib import Path
from typing import Any, NoReturn

MODULES = (
    "torch.distributed.elastic.multiprocessing", "megatron.core.models.gpt", "moe_train.train", "torch._dynamo",
    "matplotlib.backends.backend_svg", "matplotlib.figure", "launch.main", "launch.join", "launch.slurm.submit",
    "launch.local.launcher", "launch.preflight.rank", "tools.plan", "tools.memory", "tools.convert", "tools.inspect",
    "tools.dryrun", "tools.prepare_data", "tools.chat", "tools.serve", "tools.serving.app", "uvicorn",
    "tests.launch.fake_job",
)  # fmt: skip
MOST_BYTES = 2**20
FIRST_FREE = 3  # file descriptors after those of the standard streams
_PASSED_ALONG = 200  # where descriptors are put meanwhile, above all that a command has

Request = dict[str, Any]
Work = Callable[[], None]


def serve(channel: socket.socket) -> Work:
    """Fork for each request, and tell how each fork ended. Returns in a fork, with what it is to do; ends with the
    other end of `channel`."""
    reports: dict[int, socket.socket] = {}
    wake, woken = socket.socketpair()
    for end in (wake, woken):
        end.setblocking(False)
    signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    selector = selectors.DefaultSelector()
    selector.register(channel, selectors.EVENT_READ)
    selector.register(woken, selectors.EVENT_READ)
    while True:
        ready = {key.fileobj for key, _ in selector.select()}
        if woken in ready:
            woken.recv(4096)
            _report_ended(reports)
        if channel in ready:
            data, descriptors, _, _ = socket.recv_fds(channel, MOST_BYTES, 8)
            if not data:
                os._exit(0)
            request: Request = pickle.loads(data)
            is_command = "words" in request
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            pid = os.fork() if is_command else _fork_orphan()
            if not pid:
                signal.set_wakeup_fd(-1)
                # Now: one that is closed as garbage later would close what has its number then.
                for thing in (selector, channel, wake, woken, *reports.values()):
                    thing.close()
                if is_command:
                    return lambda: _become(request, descriptors[:3])
                return lambda: _end(_fork_ranks, request, descriptors)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            if is_command:
                reports[pid] = socket.socket(fileno=descriptors.pop())
            for descriptor in descriptors:
                os.close(descriptor)
            channel.send(struct.pack("i", pid))


def _fork_orphan() -> int:
    """Fork a process whose parent has ended when this returns. Returns its id, and 0 in that process."""
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(writer)
        pid = struct.unpack("i", os.read(reader, 4))[0]
        os.close(reader)
        os.waitpid(child, 0)
        return int(pid)
    pid = os.fork()
    if pid:
        os.write(writer, struct.pack("i", pid))
        os._exit(0)
    os.close(reader)
    os.close(writer)
    return 0


def _report_ended(reports: dict[int, socket.socket]) -> None:
    for pid in list(reports):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            with reports.pop(pid) as report, contextlib.suppress(OSError):
                report.send(struct.pack("i", status))


def _become(request: Request, streams: list[int]) -> None:
    """Be the process that was asked for, to its end."""
    for number, descriptor in enumerate(streams):
        os.dup2(descriptor, number)
    os.closerange(FIRST_FREE, os.sysconf("SC_OPEN_MAX"))
    if request["new_session"]:
        os.setsid()
    os.umask(request["umask"])
    _surroundings(request["environment"], request["directory"])
    _signals(request["ignored"])
    standby = _Standby(request["ignored"])
    util.spawnv_passfds = standby.spawn
    sys.stdin, sys.stdout, sys.stderr = _opened(0, "r"), _opened(1, "w"), _opened(2, "w")
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    signal.pthread_sigmask(signal.SIG_SETMASK, request["mask"])
    if request["whole_end"]:
        _run(request["words"])
    else:
        _end(_run, request["words"])


def _surroundings(environment: dict[str, str], directory: str) -> None:
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # it depends on the environment
    if "OMP_NUM_THREADS" in environment:
        importlib.import_module("torch").set_num_threads(int(environment["OMP_NUM_THREADS"]))


def _signals(ignored: list[int]) -> None:
    """What a new process of Python begins with."""
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        with contextlib.suppress(OSError, ValueError):  # those of the C library
            signal.signal(number, signal.SIG_IGN)  # drops those that are pending
            if number not in ignored and number not in (signal.SIGPIPE, signal.SIGXFSZ):
                signal.signal(number, signal.SIG_DFL)
    if signal.SIGINT not in ignored:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _opened(number: int, mode: str) -> io.TextIOWrapper:
    """A standard stream as Python opens it."""
    raw: Any = io.FileIO(number, mode, closefd=False)
    raw.name = ("<stdin>", "<stdout>", "<stderr>")[number]
    like: Any = (sys.__stdin__, sys.__stdout__, sys.__stderr__)[number]  # by locale and PYTHONUNBUFFERED
    buffer = io.BufferedReader(raw) if mode == "r" else raw if like.write_through else io.BufferedWriter(raw)
    stream: Any = io.TextIOWrapper(
        buffer, like.encoding, like.errors, write_through=like.write_through,
        line_buffering=not like.write_through and (number == 2 or raw.isatty()),
    )  # fmt: skip
    stream.mode = mode
    return stream


def _run(words: list[str]) -> None:
    """`python -m MODULE ARGUMENT...` or `SCRIPT ARGUMENT...`, where the script is one of Python."""
    if words[0] == "-m":
        sys.argv, sys.path[0] = words[1:], os.getcwd()
        sys.modules.pop(words[1], None)  # a new process has it as __main__ alone
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = words, os.path.dirname(words[0])
        runpy.run_path(words[0], run_name="__main__")


def _end(work: Callable[..., None], *args: Any) -> NoReturn:
    """End as Python does after `work`, without the second in which it would take down all modules."""
    code: object = 0
    interrupted = False
    try:
        work(*args)
    except SystemExit as exit_:
        code = exit_.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
    except BaseException as error:
        traceback.print_exc()
        code, interrupted = 1, isinstance(error, KeyboardInterrupt)
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    if interrupted:
        sys.stdout.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            code = code or 120
    os._exit(code & 0xFF if isinstance(code, int) else int(code is not None))


class _Standby:
    """A fork of a command at its beginning, which becomes the launcher's fork server when it wants one."""

    def __init__(self, ignored: list[int]) -> None:
        self._spawn = util.spawnv_passfds
        self._own, other = socket.socketpair()
        self._pid = os.fork()
        if not self._pid:
            self._own.close()
            _end(self._wait, other, ignored)
        other.close()
        self._used = False

    def spawn(self, path: str, args: list[str], passed: tuple[int, ...]) -> int:
        """In place of `multiprocessing.util.spawnv_passfds`."""
        code = args[-1]
        if self._used or "forkserver import main" not in str(code):
            return self._spawn(path, args, passed)
        self._used = True
        socket.send_fds(self._own, [pickle.dumps(fork_server_request(code, passed))], list(passed))
        self._own.close()
        return self._pid

    @staticmethod
    def _wait(other: socket.socket, ignored: list[int]) -> None:
        data, descriptors, _, _ = socket.recv_fds(other, MOST_BYTES, 8)
        other.close()
        if not data:
            os._exit(0)  # the command has ended and wanted none
        _fork_ranks(pickle.loads(data), descriptors)


def fork_server_request(code: str, passed: Sequence[int]) -> Request:
    """What a fork server of `multiprocessing` needs to know of the process that wants it.

    Args:
        code: the program that `multiprocessing` would start with `python -c`.
        passed: its file descriptors, those that the program names among them.
    """
    return {
        "code": code, "numbers": list(passed), "environment": dict(os.environ), "directory": os.getcwd(),
        "mask": signal.pthread_sigmask(signal.SIG_BLOCK, ()),
        "ignored": [n for n in signal.valid_signals() if signal.getsignal(n) is signal.SIG_IGN],
    }  # fmt: skip


def _fork_ranks(request: Request, descriptors: list[int]) -> None:
    """Be a fork server of `multiprocessing`, to its end."""
    moved = [os.dup2(descriptor, _PASSED_ALONG + i) for i, descriptor in enumerate(descriptors)]
    os.closerange(FIRST_FREE, _PASSED_ALONG)
    for descriptor, number in zip(moved, request["numbers"], strict=True):
        os.dup2(descriptor, number)
        os.close(descriptor)
    _surroundings(request["environment"], request["directory"])
    _signals(request["ignored"])
    signal.pthread_sigmask(signal.SIG_SETMASK, request["mask"])
    exec(request["code"], {"__name__": "__main__"})


def prepare() -> None:
    """Import what commands need, and let them compose configs from what others of them have read."""
    gc.disable()
    import pytest

    from parallel.runtime.imports import without_compilation
    from tests import composition_cache, huge_pages

    with without_compilation(), open(os.devnull, "w") as nothing, contextlib.redirect_stderr(nothing):
        for module in MODULES:
            with contextlib.suppress(ImportError):  # of a package that is not installed: it fails again where needed
                importlib.import_module(module)
    directory = Path(os.environ["XDG_CACHE_HOME"], "compositions")  # a directory of the tests
    directory.mkdir(parents=True, exist_ok=True)
    composition_cache.install(pytest.MonkeyPatch(), directory)
    # Each fork would take down torch's operators at its end, for 30 ms. A process that ends does not need to.
    for entry in weakref.finalize._registry.values():  # type: ignore[attr-defined]
        entry.atexit = False
    gc.freeze()
    huge_pages.collapse()
    gc.enable()


if __name__ == "__main__":
    from tests import forked_server  # the one module of this name, also for forks

    forked_server.prepare()
    forked_server.serve(socket.socket(fileno=int(sys.argv[1])))()
