"""What the locks of a run directory and of a dataset share: owners, heartbeats and silence. No torch import.

A heartbeat is the time of modification of the lock. No clock of another machine is compared: a lock is silent while
that time does not change for a process that watches it.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from moe_train.files import untrusted
from parallel.errors import one_line

T = TypeVar("T")
_LARGEST_BYTES = 64 * 1024
_LONGEST_NAME = 200
_LARGEST_PID = 1 << 31
_LOST_AFTER = 3  # looks in a row: a process that takes a lock over may hold it for a moment to look at it


def read_owner(path: Path, kind: type[T]) -> T | None:
    """The owner that a lock names, a dataclass with `pid`; None where there is no lock, or it is empty or damaged.

    Raises:
        OSError: it cannot be read.
    """
    try:
        owner = untrusted.read_record(path, kind, _LARGEST_BYTES)
    except (FileNotFoundError, ValueError):
        return None
    pid: int = owner.pid  # type: ignore[attr-defined]
    return owner if 0 <= pid < _LARGEST_PID else None


def printable(text: str) -> str:
    """Text from a lock as a terminal may show it: without control characters, and of bounded length."""
    return one_line(text, _LONGEST_NAME)


def name_of(pid: int, host: str) -> str:
    """The process that a lock names."""
    return f"process {pid} on {printable(host)}"


class LockHeartbeat:
    """A thread that renews the modification time of a lock until `end`.

    Args:
        interval_s: seconds between two heartbeats.
        poll_s: seconds to the next look once the lock is not ours.
        is_ours: whether this process still holds the lock.
        lost: called once, in the thread, when the lock is gone or not ours at three looks in a row.

    Raises:
        RuntimeError: no thread can be started.
    """

    def __init__(
        self,
        path: Path,
        interval_s: float,
        poll_s: float,
        is_ours: Callable[[], bool] = lambda: True,
        lost: Callable[[], None] = lambda: None,
    ) -> None:
        self._path, self._interval_s, self._poll_s = path, interval_s, poll_s
        self._is_ours, self._lost = is_ours, lost
        self._end = threading.Event()
        self.thread = threading.Thread(target=self._run, name="lock-heartbeat", daemon=True)
        self.thread.start()

    def end(self) -> None:
        """Stop; the thread may be inside its last heartbeat."""
        self._end.set()

    def _run(self) -> None:
        missed = 0
        while not self._end.wait(self._poll_s if missed else self._interval_s):
            try:
                os.utime(self._path)
                is_ours = self._is_ours()
            except FileNotFoundError:
                is_ours = False
            except OSError:  # a storage that does not answer, or is read-only: continue without it
                continue
            missed = 0 if is_ours else missed + 1
            if missed == _LOST_AFTER and not self._end.is_set():
                self._lost()
                return


class LockWatch:
    """Observes the heartbeat of a lock that another process holds. Seconds are those of this machine's clock."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: int | None = None
        self._began = self._last = time.monotonic()

    @property
    def is_new(self) -> bool:
        """Whether no time of modification has been seen yet."""
        return self._seen is None

    @property
    def watched_s(self) -> float:
        """Seconds since the watch began."""
        return time.monotonic() - self._began

    @property
    def silent_s(self) -> float:
        """Seconds since the last heartbeat that `look` has seen, or since the watch began."""
        return time.monotonic() - self._last

    def look(self) -> bool:
        """Whether there was a heartbeat since the last look; False for the first look.

        Raises:
            OSError: the lock is gone, or cannot be read.
        """
        before, self._seen = self._seen, self._path.stat().st_mtime_ns
        if self._seen == before:
            return False
        self._last = time.monotonic()
        return before is not None
