"""`subprocess.run` and `subprocess.Popen` for commands of this project, without the seconds of their imports.

The process is a fork of one that has imported torch and Megatron-Core (`tests.forked_server`); arguments, environment,
directory, files, process group, signals and exit code are those of a new process. Use `subprocess` where the start or
the end of the interpreter is tested: what a command imports, how long that takes, what is on its command line.
MOE_TESTS_EXEC=1 starts new processes everywhere.
"""

from __future__ import annotations

import ctypes
import inspect
import os
import pickle
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
from functools import cache
from multiprocessing import forkserver, util
from pathlib import Path
from typing import Any

import psutil

from tests import forked_server

ROOT = Path(__file__).parents[1]
OF_INTERPRETER = ("PYTHON", "LC_", "LANG", "MKL_", "OPENBLAS_", "LD_", "MALLOC_")
"""Variables that count when a process starts. A command for which they differ is a new process."""


class Popen(subprocess.Popen[Any]):
    """A process with the interface of `subprocess.Popen`. Its parent is the server, which tells how it ended.

    Args:
        whole_end: it takes down all modules at its end, as a new process does, where it would end right after its exit
            functions.
    """

    _report: socket.socket | None = None

    def __init__(self, words: list[str], *, whole_end: bool = False, **options: Any) -> None:
        self._whole_end = whole_end
        super().__init__(words, **options)

    def _execute_child(self, *args: Any) -> None:
        stock = super()._execute_child  # type: ignore[misc]
        given = inspect.signature(stock).bind(*args).arguments
        words = _words(given["args"])
        if words is None or given["preexec_fn"] or given["pass_fds"] or not _same_interpreter(given["env"]):
            stock(*args)
            return
        report, other = socket.socketpair()
        streams = [given["p2cread"], given["c2pwrite"], given["errwrite"]]
        request = {
            "words": words,
            "directory": os.fspath(given["cwd"] or os.getcwd()),
            "environment": dict(os.environ if given["env"] is None else given["env"]),
            "new_session": given["start_new_session"],
            "whole_end": self._whole_end,
            "umask": _umask(),
            "ignored": [n for n in signal.valid_signals() if signal.getsignal(n) is signal.SIG_IGN],
            "mask": signal.pthread_sigmask(signal.SIG_BLOCK, ()),
        }
        descriptors = [stream if stream != -1 else number for number, stream in enumerate(streams)]
        self.pid = _server().start(request, [*descriptors, other.fileno()])
        other.close()
        self._report, self._child_created = report, True
        pipes = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(given[name] for name in pipes))  # type: ignore[attr-defined]

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        if self._report is None:
            return super()._try_wait(wait_flags)  # type: ignore[misc,no-any-return]
        if wait_flags & os.WNOHANG and not select.select([self._report], [], [], 0)[0]:
            return 0, 0
        data = self._report.recv(4)
        self._report.close()
        # Without a report the server is gone, and with it how the process ended.
        return self.pid, struct.unpack("i", data)[0] if data else signal.SIGKILL

    def _internal_poll(self, *args: Any, **more: Any) -> int | None:
        if self._report is None:
            return super()._internal_poll(*args, **more)  # type: ignore[misc,no-any-return]
        if self.returncode is None and self._waitpid_lock.acquire(False):  # type: ignore[attr-defined]
            try:
                if self.returncode is None:
                    pid, status = self._try_wait(os.WNOHANG)
                    if pid:
                        self._handle_exitstatus(status)  # type: ignore[attr-defined]
            finally:
                self._waitpid_lock.release()  # type: ignore[attr-defined]
        return self.returncode


def run(
    words: list[str], *, timeout: float, capture_output: bool = False, check: bool = False, **options: Any
) -> subprocess.CompletedProcess[Any]:
    """As `subprocess.run`."""
    if capture_output:
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with Popen(words, **options) as process:
        try:
            output, errors = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(words, process.returncode, output, errors)
    if check:
        done.check_returncode()
    return done


def _words(words: Any) -> list[str] | None:
    """What follows `python`, or the command line of a script of this environment; None for any other program."""
    words = [os.fspath(word) for word in words] if isinstance(words, (list, tuple)) else []
    if len(words) > 2 and words[0] == sys.executable and words[1] == "-m":
        return words[1:]
    directory = os.path.dirname(sys.executable)
    if words and os.path.dirname(words[0]) == directory and os.path.basename(words[0]).startswith("moe-"):
        return words
    return None


def _same_interpreter(environment: Any) -> bool:
    if os.environ.get("MOE_TESTS_EXEC"):
        return False
    if environment is None:
        return True

    def counts(variables: Any) -> dict[str, str]:
        return {k: v for k, v in variables.items() if k.startswith(OF_INTERPRETER) and k != "PYTHONPATH"}

    return counts(environment) == counts(os.environ)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


class _Server:
    def __init__(self) -> None:
        self._channel, other = socket.socketpair()
        self._lock = threading.Lock()
        command = [sys.executable, "-m", "tests.forked_server", str(other.fileno())]
        self._process = subprocess.Popen(command, cwd=ROOT, pass_fds=[other.fileno()])
        other.close()

    def start(self, request: dict[str, Any], descriptors: list[int]) -> int:
        """Process id of the fork that does what is asked."""
        with self._lock:
            socket.send_fds(self._channel, [pickle.dumps(request)], descriptors)
            answer = self._channel.recv(4)
        if not answer:
            raise RuntimeError("tests.forked_server has ended")
        return int(struct.unpack("i", answer)[0])


@cache
def _server() -> _Server:
    return _Server()


_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
_spawn = util.spawnv_passfds


def fork_the_fork_server() -> None:
    """Have `multiprocessing` fork its fork server, too, from the server of commands, which has its modules."""
    util.spawnv_passfds = _spawned


def _spawned(path: str, args: list[str], passed: tuple[int, ...]) -> int:
    """In place of `multiprocessing.util.spawnv_passfds`: the id of a child of this process."""
    code = args[-1]
    if sys.platform != "linux" or os.environ.get("MOE_TESTS_EXEC") or "forkserver import main" not in str(code):
        return _spawn(path, args, passed)
    prctl = ctypes.CDLL(None).prctl
    files = (0, 1, 2, *passed)
    # Its parent ends at once: it becomes a child of this process, which waits for it as for any child.
    prctl(_PR_SET_CHILD_SUBREAPER, 1)
    try:
        return _server().start(forked_server.fork_server_request(code, files), list(files))
    finally:
        prctl(_PR_SET_CHILD_SUBREAPER, 0)


def below(pid: int) -> list[psutil.Process]:
    """Processes below a pytest worker, without the server of commands and what belongs to it, and without the two of
    multiprocessing itself: its fork server and its resource tracker."""
    worker = psutil.Process(pid)
    own: set[psutil.Process] = set()
    for child in worker.children():
        command = " ".join(child.cmdline())
        if child.pid == getattr(forkserver._forkserver, "_forkserver_pid", None):
            own.add(child)
        elif "tests.forked_server" in command:
            own |= {child, *child.children(recursive=True)}
        elif "multiprocessing" in command:
            own.add(child)
    return [process for process in worker.children(recursive=True) if process not in own]
