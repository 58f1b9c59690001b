"""A file of records that a run appends to, and that must not end the run. No torch import.

A full or read-only run_dir, or a storage that does not answer, is a warning. What cannot be written is kept in memory
up to a limit and written when that is possible again.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from pathlib import Path

MOST_BYTES = 1 << 26
"""Of records that wait in memory, for one file."""


class PatientFile:
    """Appends records, each whole and at once, or later.

    Args:
        path: the file, which is made where it does not exist.
        content: name of the records in warnings: "lines", "events".
        most_bytes: that wait in memory; further records are lost, and counted.
    """

    def __init__(self, path: Path, content: str = "lines", most_bytes: int = MOST_BYTES) -> None:
        self.path, self.content, self.most_bytes = path, content, most_bytes
        self.lost = 0
        """Records that had no room in memory."""
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._descriptor = -1
        self._failed = ""
        self._late = 0

    @property
    def failure(self) -> str:
        """Why records cannot be written at the moment; "" if they can."""
        return self._failed

    def write(self, record: bytes | str) -> int:
        """Append a record, with its end of line where it has one. Never raises OSError."""
        data = record.encode() if isinstance(record, str) else record
        if self._waiting and self._waiting_bytes + len(data) > self.most_bytes:
            self.lost += 1
        else:
            self._waiting.append(data)
            self._waiting_bytes += len(data)
        self.flush()
        return len(data)

    def flush(self) -> None:
        """Write what waits, if that is possible."""
        late = len(self._waiting) if self._failed else 0
        try:
            self._drain()
        except OSError as error:
            self._close()  # a handle of a storage that was away can stay unusable
            if not self._failed:
                self._failed = error.strerror or str(error)
                warn(f"{self.path} cannot be written: {self._failed}; the run continues and buffers its {self.content}")
            return
        self._late += late
        if self._failed and not self._waiting:
            warn(f"{self.path} can be written again: {self._late} {self.content} came late, {self.lost} were lost")
            self._failed, self._late, self.lost = "", 0, 0

    def close(self) -> None:
        """Try once more, and say how many records are lost."""
        self.flush()
        if self._failed:
            warn(f"{self.lost + len(self._waiting)} {self.content} of {self.path} are lost: {self._failed}")
        self._waiting.clear()
        self._waiting_bytes = 0
        self._close()

    def _drain(self) -> None:
        if self._waiting and self._descriptor < 0:
            self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        while self._waiting:
            data = self._waiting[0]
            done = os.write(self._descriptor, data)
            self._waiting_bytes -= done
            if done < len(data):  # the disk filled up: the rest of the record follows what is there
                self._waiting[0] = data[done:]
            else:
                self._waiting.popleft()

    def _close(self) -> None:
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            try:
                os.close(descriptor)
            except OSError as error:  # NFS reports here what it could not write
                self._failed = self._failed or error.strerror or str(error)


def warn(line: str) -> None:
    """Tell the terminal of rank 0."""
    print(f"warning: {line}", file=sys.stderr, flush=True)
