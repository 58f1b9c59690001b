"""One process makes a dataset, and the others wait for it. No torch import.

The lock is a file with the name of its owner. Where the file system has `flock`, that ends with the process. A time of
change that no longer moves tells of an owner that is stopped, or, without `flock`, gone.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from parallel.errors import DataError

NAME = ".lock"
BEAT_S, STALE_S = 5.0, 120.0
_POLL_S = 0.2
_NO_FLOCK = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)


@contextlib.contextmanager
def only_one(directory: Path, tell: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock of `directory`; waits while another process holds it and is alive.

    Args:
        tell: called once with a line that says which process is waited for.

    Raises:
        DataError: the other process holds the lock, but has not run for `STALE_S` seconds.
        OSError: the lock cannot be written.
    """
    path = directory / NAME
    held = _wait(path, directory, tell)
    stop = threading.Event()
    beat = threading.Thread(target=_beat, args=(path, stop), daemon=True)
    beat.start()
    try:
        yield
    finally:
        stop.set()
        beat.join()
        with contextlib.suppress(OSError):
            held.truncate(0)  # no owner
        held.close()


def _wait(path: Path, directory: Path, tell: Callable[[str], None]) -> IO[str]:
    told = False
    seen, since = 0, time.monotonic()
    while True:
        file = _try(path)
        if file is not None:
            return file
        # The clock of this machine measures how long the time of change has not moved: file servers have another one.
        changed = path.stat().st_mtime_ns if path.exists() else 0
        if changed != seen:
            seen, since = changed, time.monotonic()
        owner = _owner(path)
        if time.monotonic() - since > STALE_S:
            raise DataError(
                f"{owner} is making data.dir={directory}, but has not run for {STALE_S:.0f} s",
                f"end it and run the command again, or delete {path} if that process is gone",
            )
        if not told:
            tell(f"waiting for {owner}, which is making data.dir={directory}")
            told = True
        time.sleep(_POLL_S)


def _try(path: Path) -> IO[str] | None:
    """The lock file, locked and with this process as its owner; None where another one has it."""
    import fcntl

    file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - it stays open as long as the lock is held
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
    if owner and owner.get("host") != socket.gethostname() and _beats(path):
        file.close()  # `flock` of this file system does not reach other nodes, and one of them is at work
        return None
    file.truncate(0)
    json.dump({"host": socket.gethostname(), "pid": os.getpid(), "job": os.environ.get("SLURM_JOB_ID")}, file)
    file.flush()
    return file


def _beats(path: Path) -> bool:
    """Whether another process keeps the time of change moving."""
    before = path.stat().st_mtime_ns
    deadline = time.monotonic() + 3 * BEAT_S
    while time.monotonic() < deadline:
        time.sleep(_POLL_S)
        if not path.exists() or not _read(path):
            return False
        if path.stat().st_mtime_ns != before:
            return True
    return False


def _beat(path: Path, stop: threading.Event) -> None:
    while not stop.wait(BEAT_S):
        with contextlib.suppress(OSError):
            os.utime(path)


def _read(path: Path) -> dict[str, Any]:
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _owner(path: Path) -> str:
    owner = _read(path)
    if not owner:
        return "another process"
    job = f" of job {owner['job']}" if owner.get("job") else ""
    return f"process {owner.get('pid')} on {owner.get('host')}{job}"
