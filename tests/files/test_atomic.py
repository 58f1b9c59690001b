"""A file is written whole or not at all: errors and interruptions leave the old one, and no temporary file."""

from __future__ import annotations

import errno
import os
import resource
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from moe_train.files import atomic


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file with content, the only one in its directory."""
    path = tmp_path / "state.json"
    path.write_text("old")
    return path


def is_untouched(file: Path) -> bool:
    return file.read_text() == "old" and os.listdir(file.parent) == [file.name]


def test_what_was_written_replaces_the_file(file: Path) -> None:
    atomic.write_text(file, "größer\n")
    assert file.read_bytes() == b"gr\xc3\xb6\xc3\x9fer\n"
    atomic.write_bytes(file, b"\xff\r\n", durable=True)
    assert file.read_bytes() == b"\xff\r\n"
    with atomic.replacement(file) as temporary:
        assert not temporary.exists()
        temporary.write_text("a")
        assert file.read_bytes() == b"\xff\r\n"  # until the end
        assert temporary.parent == file.parent  # a rename does not cross file systems
        assert list(file.parent.glob("state*")) == [file]
    assert file.read_text() == "a"
    assert os.listdir(file.parent) == [file.name]


def test_a_file_need_not_exist_before(tmp_path: Path) -> None:
    atomic.write_text(tmp_path / "new", "a")
    assert (tmp_path / "new").read_text() == "a"


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664)])
def test_permissions_are_those_of_a_new_file(umask: int, mode: int, file: Path) -> None:
    """A temporary file of `tempfile` has 0600: a colleague could not read the file."""
    before = os.umask(umask)
    try:
        atomic.write_text(file, "a")
    finally:
        os.umask(before)
    assert stat.S_IMODE(file.stat().st_mode) == mode


def test_a_full_disk_leaves_the_old_file(file: Path) -> None:
    def write() -> None:
        with atomic.replacement(file) as temporary:
            temporary.symlink_to("/dev/full")  # writing to it fails as on a full disk
            temporary.write_text("a")

    with pytest.raises(OSError, match=rf"^\[Errno {errno.ENOSPC}\] No space left on device: '{file}'$"):
        write()
    assert is_untouched(file)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The kernel refuses to write more to a file of this process."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("durable", [False, True])
def test_a_write_that_fails_halfway_leaves_the_old_file(durable: bool, file: Path) -> None:
    with largest_file(1000), pytest.raises(OSError, match=rf"^\[Errno {errno.EFBIG}\] File too large: '{file}'$"):
        atomic.write_bytes(file, bytes(2000), durable)
    assert is_untouched(file)


@pytest.mark.parametrize("interrupt", [lambda: signal.raise_signal(signal.SIGINT), lambda: sys.exit(1)])
def test_an_interruption_leaves_the_old_file(interrupt: Callable[[], None], file: Path) -> None:
    def write() -> None:
        with atomic.replacement(file) as temporary:
            temporary.write_text("half")
            interrupt()

    with pytest.raises((KeyboardInterrupt, SystemExit)):
        write()
    assert is_untouched(file)


def test_bytes_that_do_not_reach_the_disk_leave_the_old_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output error"):
        atomic.write_text(file, "a", durable=True)
    assert is_untouched(file)
    atomic.write_text(file, "a")  # does not wait for the disk
    assert file.read_text() == "a"


def test_a_rename_that_fails_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    with pytest.raises(IsADirectoryError, match=rf"Is a directory: '{tmp_path}/file'$"):
        atomic.write_text(tmp_path / "file", "a")
    assert os.listdir(tmp_path) == ["file"]


def test_a_directory_that_does_not_exist_is_named_by_the_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"'{tmp_path}/none/file'$"):
        atomic.write_text(tmp_path / "none" / "file", "a")


def test_errors_of_other_files_keep_their_names(file: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"'{tmp_path}/source'$"), atomic.replacement(file):
        (tmp_path / "source").read_text()
    assert is_untouched(file)


def test_content_is_on_disk_before_the_name_and_then_the_name(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    fsync, replace = os.fsync, os.replace

    def traced_fsync(descriptor: int) -> None:
        steps.append("directory" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else os.pread(descriptor, 9, 0))
        fsync(descriptor)

    def traced_replace(source: Path, target: Path) -> None:
        steps.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", traced_fsync)
    monkeypatch.setattr(os, "replace", traced_replace)
    atomic.write_text(file, "a", durable=True)
    assert steps == [b"a", "rename", "directory"]


def test_several_writers_do_not_share_a_temporary_file(file: Path) -> None:
    with atomic.replacement(file) as first, atomic.replacement(file) as second:
        first.write_text("first")
        second.write_text("second")
    assert file.read_text() == "first"  # whose block ends last
    assert os.listdir(file.parent) == [file.name]


KILLED = """
import os, signal, sys
from pathlib import Path
from moe_train.files import atomic
with atomic.replacement(Path(sys.argv[1])) as temporary:
    temporary.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_leaves_can_be_removed(file: Path) -> None:
    assert subprocess.run([sys.executable, "-c", KILLED, str(file)], check=False).returncode == -signal.SIGKILL
    (leftover,) = set(file.parent.iterdir()) - {file}
    others = {
        file,
        *(file.with_name(name) for name in (".state.json.part", ".state.json.0123.part", ".x" + leftover.name)),
    }
    for other in others - {file}:
        other.touch()
    assert file.read_text() == "old"
    atomic.remove_leftovers(file)
    assert set(file.parent.iterdir()) == others
    atomic.remove_leftovers(file.parent / "none" / "file")  # nothing to do
