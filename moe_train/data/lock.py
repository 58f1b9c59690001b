"""One process makes a dataset, and the others wait for it. No torch import.

The lock is a file with the name of its owner. Where the file system has `flock`, that ends with the process. An owner
without a heartbeat is stopped or, without `flock`, gone.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from moe_train.files import locks
from parallel.errors import DataError

NAME = ".lock"
BEAT_S, STALE_S = 5.0, 120.0
_POLL_S = 0.2
_NO_FLOCK = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)


@dataclass(frozen=True)
class _Owner:
    """The process that makes a dataset; `job` is the number of its Slurm job."""

    host: str
    pid: int
    job: str | None = None

    def __str__(self) -> str:
        process = locks.name_of(self.pid, self.host)
        return f"{process} of job {locks.printable(self.job)}" if self.job else process


@contextlib.contextmanager
def only_one(directory: Path, notify: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock of `directory`; waits while another process holds it and is alive.

    Args:
        notify: called once with a line about the process that holds the lock.

    Raises:
        DataError: the other process holds the lock, but has not run for `STALE_S` seconds; or the lock is not a file,
            or no thread can be started.
        OSError: the lock cannot be written.
    """
    path = directory / NAME
    lock_file = _wait(path, directory, notify)
    try:
        beat = locks.LockHeartbeat(path, BEAT_S, _POLL_S)
    except RuntimeError as error:
        _let_go(lock_file)
        raise DataError(f"the lock of data.dir needs a thread: {error}", "raise ulimit -u and ulimit -v") from None
    try:
        yield
    finally:
        beat.end()
        beat.thread.join()
        _let_go(lock_file)


def _let_go(lock_file: IO[str]) -> None:
    with contextlib.suppress(OSError):
        lock_file.truncate(0)  # no owner
    lock_file.close()


def _wait(path: Path, directory: Path, notify: Callable[[str], None]) -> IO[str]:
    notified = False
    watch = locks.LockWatch(path)
    while True:
        file = _try(path)
        if file is not None:
            return file
        with contextlib.suppress(FileNotFoundError):
            watch.look()
        owner = _read(path) or "another process"
        if watch.silent_s > STALE_S:
            raise DataError(
                f"{owner} is making data.dir={directory}, but has not run for {STALE_S:.0f} s",
                f"end it and run the command again, or delete {path} if that process is gone",
            )
        if not notified:
            notify(f"waiting for {owner}, which is making data.dir={directory}")
            notified = True
        time.sleep(_POLL_S)


def _try(path: Path) -> IO[str] | None:
    """The lock file, locked and with this process as its owner; None where another one has it."""
    import fcntl

    file = _open(path)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if isinstance(error, BlockingIOError):
            file.close()
            return None
        if error.errno not in _NO_FLOCK:
            file.close()
            raise
    owner = _read(path)
    if owner is not None and owner.host != socket.gethostname() and _beats(path):
        file.close()  # `flock` of this file system does not reach other nodes, and one of them is at work
        return None
    file.truncate(0)
    json.dump(asdict(_Owner(socket.gethostname(), os.getpid(), os.environ.get("SLURM_JOB_ID"))), file)
    file.flush()
    return file


def _open(path: Path) -> IO[str]:
    """The lock for reading and writing. A link is not followed: the file that it leads to would be emptied."""
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        file = os.fdopen(os.open(path, flags, 0o666), "a+", encoding="utf-8")
    except OSError:
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise _not_a_file(path) from None
        raise
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        return file
    file.close()
    raise _not_a_file(path)


def _not_a_file(path: Path) -> DataError:
    return DataError(f"{path} is a link, a pipe or a directory, and not the lock of a dataset", f"remove {path}")


def _beats(path: Path) -> bool:
    """Whether another process holds the lock, and has a heartbeat."""
    watch = locks.LockWatch(path)
    while watch.watched_s < 3 * BEAT_S:
        try:
            if watch.look():
                return True
        except OSError:
            return False
        time.sleep(_POLL_S)
        if _read(path) is None:
            return False
    return False


def _read(path: Path) -> _Owner | None:
    """The owner that the lock names; None where it names none, or cannot be read."""
    try:
        return locks.read_owner(path, _Owner)
    except OSError:
        return None
