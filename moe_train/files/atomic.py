"""Files that appear whole or not at all. No torch import.

The bytes go to a temporary file in the same directory, which is renamed when it is complete. Another process reads the
old file or the new one. After an error or an interruption the temporary file is removed; a process that a signal ends
at once leaves it. A symbolic link at the path is replaced, and not what it points to. The name is hidden, so that no
pattern for the file's own name matches it, and random, so that several processes and machines may write the same file,
and nobody can put a symbolic link there beforehand. Permissions are those of any new file under the umask.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_OF_DISKS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}


@contextmanager
def replacement(path: Path, durable: bool = False) -> Iterator[Path]:
    """Path of a temporary file, which does not exist yet. What the body writes there becomes `path` when it ends.

    Args:
        durable: the bytes are on disk before the file gets its name, and the name is on disk at the end. Otherwise a
            power cut may leave an empty file.

    Raises:
        OSError: of the body, or the file cannot be renamed. It names `path`, and not the temporary file.
    """
    part = path.with_name(f".{path.name}.{os.urandom(8).hex()}.part")
    try:
        yield part
        if durable:
            sync(part)
        os.replace(part, path)
    except BaseException as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        unnamed = isinstance(error, OSError) and error.filename is None and error.errno in _OF_DISKS
        if isinstance(error, OSError) and (unnamed or str(error.filename) == str(part)):
            error.filename = str(path)  # write() does not know a name
            del error.filename2  # of a rename
        raise
    if durable:
        try:
            sync(path.parent)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that cannot sync a directory
                raise


def write_bytes(path: Path, content: bytes, durable: bool = False) -> None:
    """Write a file that appears whole. `durable` and errors: as `replacement`."""
    with replacement(path, durable) as part, part.open("xb") as file:
        file.write(content)


def write_text(path: Path, text: str, durable: bool = False) -> None:
    """Write a file of UTF-8 text that appears whole. `durable` and errors: as `replacement`."""
    write_bytes(path, text.encode(), durable)


def remove_leftovers(path: Path) -> None:
    """Remove the temporary files of `path` that killed processes left. Only where no other process may write `path`."""
    name = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{16}}\.part")
    # What stays takes space and does no other harm.
    with suppress(OSError):
        for leftover in list(path.parent.iterdir()):
            if name.fullmatch(leftover.name):
                with suppress(OSError):
                    leftover.unlink()


def sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
