"""A file that is written from start to end past the page cache, and its SHA-256.

A checkpoint is larger than what the page cache holds well, and nobody reads it back soon: the kernel's copy of it costs
more time than its hash does, and pushes out what others keep there. With `O_DIRECT` the disk takes the bytes from
the memory they are in (open(2), write(2)). File systems that do not offer it get ordinary writes.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import mmap
import os
from pathlib import Path
from typing import Any

_BUFFER_BYTES = 1 << 21
"""Written to the disk at once."""

_ALIGNED = 4096
"""Memory, length and place of a direct write are multiples of it: no disk's blocks are larger."""

_DIRECT = getattr(os, "O_DIRECT", 0)


class HashingFile:
    """Appends bytes. What was written is complete on disk when `close` returns, and not before."""

    def __init__(self, path: Path) -> None:
        self._descriptor, self._direct = _open(path)
        self._memory = mmap.mmap(-1, _BUFFER_BYTES)
        self._buffer = memoryview(self._memory)
        self._held = 0  # bytes at the start of the buffer that are not in the file yet
        self.sha256, self.position = hashlib.sha256(), 0
        self.error: OSError | None = None
        """What the disk said first; nothing is written after it. `zipfile`, which closes its archive then, may raise
        another error from that.
        """

    def scratch(self, size: int) -> memoryview:
        """Memory for what is to be written next, good until then. Unless it is large, writing it moves nothing."""
        if size > _BUFFER_BYTES - _ALIGNED:
            return memoryview(bytearray(size))
        if size > _BUFFER_BYTES - self._held:
            self._drain()
        return self._buffer[self._held : self._held + size]

    def write(self, data: Any) -> int:
        """Append bytes."""
        view = memoryview(data).cast("B")
        self.sha256.update(view)
        self.position += len(view)
        if len(view) <= _BUFFER_BYTES - self._held and _address(view) == _address(self._buffer[self._held :]):
            self._held += len(view)  # it is scratch memory
            return len(view)
        done = 0
        while done < len(view):
            count = min(len(view) - done, _BUFFER_BYTES - self._held)
            self._buffer[self._held : self._held + count] = view[done : done + count]
            self._held, done = self._held + count, done + count
            if self._held == _BUFFER_BYTES:
                self._drain()
        return len(view)

    def flush(self) -> None:
        """torch.save and zipfile ask for it; `close` does it."""

    def close(self, wait: bool = True) -> None:
        """Write the rest. Unless told not to `wait`, all of it is on disk when this returns."""
        self._drain()
        self._be_ordinary()
        self._drain()
        if wait:
            os.fsync(self._descriptor)
        self.abandon()

    def abandon(self) -> None:
        """Close without writing the rest."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def _drain(self) -> None:
        """Bring the buffer to the file: all of it, or as many whole blocks as a direct write takes."""
        if self.error:
            raise self.error
        ready = self._held // _ALIGNED * _ALIGNED if self._direct else self._held
        done = 0
        try:
            while done < ready:
                done += self._put(self._buffer[done:ready])
        except OSError as error:
            self.error = error
            raise
        rest = self._held - ready
        self._buffer[:rest] = self._buffer[ready : self._held]
        self._held = rest

    def _put(self, view: memoryview) -> int:
        try:
            return os.write(self._descriptor, view)
        except OSError as error:
            if not self._direct or error.errno != errno.EINVAL:
                raise
        self._be_ordinary()  # blocks larger than any known, or a file system that cannot what it promised
        return os.write(self._descriptor, view)

    def _be_ordinary(self) -> None:
        if self._direct:
            flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~_DIRECT)
            self._direct = False


def _open(path: Path) -> tuple[int, bool]:
    """Descriptor of an empty file, and whether it is written past the page cache."""
    # A symbolic link that someone put there would choose the file that is overwritten, and a named pipe would block.
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    if _DIRECT:
        try:
            return os.open(path, flags | _DIRECT, 0o666), True
        except OSError as error:
            if error.errno != errno.EINVAL:  # what a file system without it says, open(2)
                raise
    return os.open(path, flags, 0o666), False


def _address(view: memoryview) -> int | None:
    """Where a writable view's bytes are."""
    return None if view.readonly or not len(view) else ctypes.addressof(ctypes.c_char.from_buffer(view))
