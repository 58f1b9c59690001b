"""A process of `make gpu-check`: its task, how it starts and how it ends. Nothing here imports torch."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from launch import quiet
from launch.local import rank
from moe_train.config.composition.compose import compose
from moe_train.config.schema import Config

_KILLED_S = 10.0
"""For a killed process to end; one that waits for a driver may not."""
_STATUS = threading.Lock()
"""Held while the status of a process is read, which can be read once. To start a process, multiprocessing reads that of
every other one (process.py `_cleanup`). A thread that waits for one of those then finds no status: multiprocessing
reports exit code 255, or no end."""


@dataclass(frozen=True)
class Task:
    """The input of a process.

    Args:
        name: of the case.
        entry: what it calls, as module:function.
        overrides: of the config.
        parts: what it is to report on.
        options: further arguments of the entry.
        directory: shared by all processes of the check; preparations leave their files here.
        results: file that gets a JSON line for each part.
        log: file of its output.
        threads: for computing on the CPU.
    """

    name: str
    entry: str
    overrides: list[str]
    parts: list[str]
    options: dict[str, Any]
    directory: str
    results: str
    log: str
    threads: int = 1
    environment: dict[str, str] = field(default_factory=dict)

    def report(self, part: str = "", **values: Any) -> None:
        """Add the numbers of a part to the results."""
        with Path(self.results).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"part": part, **values}) + "\n")

    def reports(self) -> list[dict[str, Any]]:
        """What was reported so far."""
        path = Path(self.results)
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []

    def kept(self, name: str) -> Path:
        """The file of the preparation `name`."""
        return Path(self.directory, f"{name.replace(' ', '-')}.pt")

    def config(self, *more: str) -> Config:
        """The config of this process, with a run_dir of its own."""
        return compose([*self.overrides, f"run_dir={Path(self.results).with_suffix('')}", *more])


def run(task: Task, wait_s: Callable[[], float], live: set[BaseProcess], *, forked: bool) -> int | None:
    """Exit code of a process that does `task`; None where it was killed, because `wait_s` seconds had passed.

    Args:
        wait_s: asked once the process has started.
        live: has the process while it runs.
        forked: from the fork server, which has imported torch; CUDA does not survive that.
    """
    context: Any = multiprocessing.get_context("forkserver" if forked else "spawn")
    environment = {**os.environ, **task.environment}
    process: BaseProcess = context.Process(target=_enter, args=(task, environment, os.getcwd()))
    with _STATUS:
        process.start()
    live.add(process)
    try:
        return _exit_code(process, max(0.0, wait_s()))
    finally:
        kill(process)
        live.discard(process)


def kill(process: BaseProcess) -> None:
    """End a process and its children; nothing happens where it has ended."""
    with _STATUS:
        if process.is_alive():
            assert process.pid is not None
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:  # it has not made its group yet
                process.kill()
    _exit_code(process, _KILLED_S)


def _exit_code(process: BaseProcess, timeout_s: float) -> int | None:
    """How a process ended; None where it still runs after `timeout_s`."""
    if connection.wait([process.sentinel], timeout_s):
        with _STATUS:
            process.join()  # it has ended, or is about to
    with _STATUS:
        return process.exitcode


def _enter(task: Task, environment: Mapping[str, str], directory: str) -> None:
    """The process: its output goes to a file, and it ends without leaving communicators, which may hang."""
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    log = os.open(task.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    quiet.silence()
    code = 0
    try:
        rank.use_threads(task.threads)
        entry: Any = rank.load(task.entry)
        entry(task)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
