"""The processes that prepare one dataset: the ranks of an MPI job or tasks of a Slurm step, and the workers of each.

They share files only. A stage is a list of tasks with one output file each; a rank does every size-th of them and waits
until all outputs are there. What a killed process had finished is not done again.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

from moe_train.data.progress import StageProgress
from moe_train.files import atomic, locks, untrusted
from parallel.errors import DataError
from parallel.exit_codes import ExitCode

FOLDER = ".ranks"
_BEAT_S, LOST_S = 5.0, 300.0
_POLL_S = 0.1
_LARGEST_BYTES = 2**16


@dataclass(frozen=True)
class RankGroup:
    """Processes of a launcher that make a dataset together.

    Attributes:
        local_size: how many of them are on this machine.
    """

    rank: int = 0
    size: int = 1
    local_size: int = 1


ALONE = RankGroup()


class TeamFinished(Exception):
    """The dataset is there: nothing is left to do for this rank."""


@dataclass(frozen=True)
class StageTask:
    """One unit of a stage.

    Attributes:
        output: the file that it writes last, and that tells that it is done.
        arguments: of the function of the stage.
        size: of its share of the progress, bytes.
    """

    output: Path
    arguments: tuple[Any, ...]
    size: int = 0


class Team:
    """This process as one of `ranks`, with its own workers.

    Args:
        directory: of the dataset, which all ranks share.
        workers: processes of this rank.
        finished: the file that rank 0 writes when all is done.
    """

    def __init__(self, ranks: RankGroup, directory: Path, workers: int, finished: Path) -> None:
        self.rank, self.size = ranks.rank, ranks.size
        self._folder, self._workers, self._finished_file = directory / FOLDER, workers, finished
        self._pool: ProcessPoolExecutor | None = None
        self._resources = contextlib.ExitStack()
        self._began_ns = 0
        self._watches: dict[int, locks.LockWatch] = {}

    def __enter__(self) -> Team:
        if self.size > 1:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._failed(self.rank).unlink(missing_ok=True)
            atomic.write_text(self._alive(self.rank), f"{locks.name_of(os.getpid(), socket.gethostname())}\n")
            self._began_ns = self._alive(self.rank).stat().st_mtime_ns
            beat = locks.LockHeartbeat(self._alive(self.rank), _BEAT_S, _BEAT_S)
            self._resources.callback(beat.end)
            others = (rank for rank in range(self.size) if rank != self.rank)
            self._watches = {rank: locks.LockWatch(self._alive(rank)) for rank in others}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._resources.__exit__(kind, error, trace)
        if isinstance(error, Exception) and not isinstance(error, TeamFinished) and self.size > 1:
            told = error if isinstance(error, DataError) else DataError(f"rank {self.rank} of moe-data failed: {error}")
            with contextlib.suppress(OSError):
                atomic.write_text(self._failed(self.rank), json.dumps({"cause": told.cause, "remedy": told.remedy}))

    def _alive(self, rank: int) -> Path:
        return self._folder / f"{rank}.alive"

    def _failed(self, rank: int) -> Path:
        return self._folder / f"{rank}.failed"

    def run(self, tasks: Sequence[StageTask], function: Callable[..., None], progress: StageProgress) -> None:
        """Do this rank's tasks that are not done yet, and wait for those of the others.

        Args:
            function: of a module; a worker calls it with the arguments of a task.

        Raises:
            DataError: of a task of any rank; a worker was killed, or a rank is gone.
        """
        own = tasks[self.rank :: self.size]
        waiting: deque[tuple[StageTask, Future[None]]] = deque()  # bounded: each waits with its arguments
        try:
            for task in own:
                if task.output.exists():
                    progress.advance(task.size, resumed=True)
                    continue
                if len(waiting) >= 2 * self._workers:
                    self._finish(*waiting.popleft(), progress)
                with _no_interrupt():
                    waiting.append((task, self._workers_pool().submit(function, *task.arguments)))
            while waiting:
                self._finish(*waiting.popleft(), progress)
        except BrokenProcessPool as error:
            raise DataError(
                "a worker process of moe-data was killed", "free memory or set data.prepare_workers=1"
            ) from error
        for number, task in enumerate(tasks):
            if number % self.size != self.rank:
                self.wait(task.output.exists)
                progress.advance(task.size)

    def _finish(self, task: StageTask, future: Future[None], progress: StageProgress) -> None:
        future.result()
        progress.advance(task.size)

    def wait(self, condition: Callable[[], bool]) -> None:
        """Return once `condition` holds.

        Raises:
            TeamFinished: rank 0 has finished.
            DataError: another rank has failed, or has not run for `LOST_S` seconds.
        """
        pause_s = _POLL_S
        while not condition():
            if self.rank and self._finished_file.exists():
                raise TeamFinished
            self._check_others()
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 1.0)
            with contextlib.suppress(OSError):
                os.listdir(self._folder.parent)  # over NFS new files of other nodes become visible

    def _check_others(self) -> None:
        for rank, watch in self._watches.items():
            with contextlib.suppress(OSError):
                watch.look()
            error = self._error_of(rank)
            if error is not None:
                raise error
            if watch.silent_s > LOST_S:
                raise DataError(
                    f"rank {rank} of moe-data has not run for {LOST_S:.0f} s", "run the command again: it resumes"
                )

    def _error_of(self, rank: int) -> DataError | None:
        """The error with which another rank ended since this one began."""
        path = self._failed(rank)
        try:
            if path.stat().st_mtime_ns < self._began_ns:  # of an earlier try
                return None
            record = untrusted.read_object(path)
            return DataError(str(record["cause"]), str(record["remedy"]))
        except (OSError, ValueError, KeyError):
            return None

    def _workers_pool(self) -> ProcessPoolExecutor:
        if self._pool is None:
            context = multiprocessing.get_context("spawn")  # a fork would copy locks of the tokenizer's threads
            alive, writer = context.Pipe(duplex=False)
            self._pool = ProcessPoolExecutor(self._workers, context, _start_worker, (alive,))
            self._resources.push(_Shutdown(self._pool, alive, writer))
        return self._pool


class _Shutdown:
    """Ends the workers of a pool: at once after an error, since nothing that one waits for may hold the others up."""

    def __init__(self, pool: ProcessPoolExecutor, alive: Connection, writer: Connection) -> None:
        self._pool, self._alive, self._writer = pool, alive, writer

    def __call__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if kind is not None:
            for child in multiprocessing.active_children():
                child.kill()
        self._writer.close()  # the workers end now: what they still do is not wanted after an error
        self._pool.shutdown(cancel_futures=True)
        self._alive.close()


@contextlib.contextmanager
def _no_interrupt() -> Iterator[None]:
    """Hold Ctrl-C back for a moment. Processes that start in it never see it, and the parent acts on it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(alive: Connection) -> None:
    threading.Thread(target=_end_with_parent, args=(alive,), daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process a core already


def _end_with_parent(alive: Connection) -> None:
    """Idle workers of a pool outlive a parent that was killed: they hold both ends of the queue that they wait for."""
    alive.poll(None)  # nothing is ever sent, so this returns when the other end is closed or its process has ended
    os._exit(ExitCode.FAILED)
