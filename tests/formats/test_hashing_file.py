"""What `HashingFile` is given is what stands in the file, however it comes, on whatever file system."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import mmap
import os
import random
from pathlib import Path
from typing import Any

import pytest

from moe_train.formats import hashing_file
from moe_train.formats.hashing_file import HashingFile

_SIZES = [0, 1, 30, 4095, 4096, 4097, 100_000, 1 << 19, (1 << 21) - 4096, (1 << 21) - 1, 1 << 21, 5 << 20]


def _write_some(path: Path, seed: int) -> bytes:
    """Writes sizes around every boundary, from scratch memory and from elsewhere; returns what must be there."""
    choice, whole = random.Random(seed), bytearray()
    file = HashingFile(path)
    for size in choice.sample(_SIZES * 2, 2 * len(_SIZES)):
        data = choice.randbytes(size)
        if choice.random() < 0.6:
            lent = file.scratch(size)
            lent[:] = data
            assert file.write(lent) == size
        else:
            assert file.write(data) == size
        whole += data
        assert file.position == len(whole)
    file.close()
    assert file.sha256.digest() == hashlib.sha256(whole).digest()
    return bytes(whole)


@pytest.mark.parametrize("seed", range(8))
def test_bytes_arrive_whatever_their_sizes(tmp_path: Path, seed: int) -> None:
    expected = _write_some(tmp_path / "file", seed)
    assert (tmp_path / "file").read_bytes() == expected


def test_only_a_part_of_scratch_memory_may_be_written(tmp_path: Path) -> None:
    file = HashingFile(tmp_path / "file")
    lent = file.scratch(1000)
    lent[:] = bytes(range(250)) * 4
    file.write(lent[:10])
    again = file.scratch(1000)
    again[:3] = b"abc"
    file.write(again[1:3])  # which moves it
    file.close()
    assert (tmp_path / "file").read_bytes() == bytes(range(10)) + b"bc"


def _cached_pages(path: Path) -> int:
    """Of a file in the kernel's memory (mincore(2))."""
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        pages = (ctypes.c_ubyte * (-(-len(memory) // mmap.PAGESIZE)))()
        address = ctypes.c_void_p(ctypes.addressof(anchor := ctypes.c_char.from_buffer(memory)))
        assert ctypes.CDLL(None, use_errno=True).mincore(address, ctypes.c_size_t(len(memory)), pages) == 0
        del anchor
        return sum(page & 1 for page in pages)


def _offers_direct_writes(directory: Path) -> bool:
    try:
        os.close(os.open(directory / "tried", os.O_WRONLY | os.O_CREAT | os.O_DIRECT))
    except OSError:
        return False
    return True


def test_written_bytes_do_not_fill_the_page_cache(tmp_path: Path) -> None:
    if not _offers_direct_writes(tmp_path):
        pytest.skip("the file system of temporary files has no direct writes")
    whole = _write_some(tmp_path / "file", 1)
    assert _cached_pages(tmp_path / "file") <= 2  # its end, which fills no block
    (tmp_path / "ordinary").write_bytes(whole)
    assert _cached_pages(tmp_path / "ordinary") >= len(whole) // mmap.PAGESIZE


def test_a_file_system_without_direct_writes_gets_ordinary_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried, really = [], os.open

    def refuse(path: Any, flags: int, *rest: int) -> int:
        tried.append(bool(flags & os.O_DIRECT))
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return really(path, flags, *rest)

    monkeypatch.setattr(hashing_file.os, "open", refuse)
    expected = _write_some(tmp_path / "file", 2)
    assert (tmp_path / "file").read_bytes() == expected
    assert tried == [True, False]


def test_a_direct_write_that_is_refused_is_done_again_as_an_ordinary_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, really = [], os.write

    def refuse_the_second(descriptor: int, data: memoryview) -> int:
        sizes.append(len(data))
        if len(sizes) == 2:
            raise OSError(errno.EINVAL, "Invalid argument")
        return really(descriptor, data)

    monkeypatch.setattr(hashing_file.os, "write", refuse_the_second)
    expected = _write_some(tmp_path / "file", 3)
    assert (tmp_path / "file").read_bytes() == expected
    assert sizes[1] == sizes[2]


def test_short_writes_are_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    really = os.write
    monkeypatch.setattr(
        hashing_file.os, "write", lambda d, data: really(d, data[: max(4096, len(data) // 8192 * 4096)])
    )
    expected = _write_some(tmp_path / "file", 4)
    assert (tmp_path / "file").read_bytes() == expected


def test_what_the_disk_said_is_kept_and_nothing_more_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, data: memoryview) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    file = HashingFile(tmp_path / "file")
    monkeypatch.setattr(hashing_file.os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        file.write(bytes(1 << 22))
    assert file.error is not None
    assert file.error.errno == errno.ENOSPC
    monkeypatch.undo()  # there is space again, too late: what came between is lost
    with pytest.raises(OSError, match="No space left"):
        file.close()
    file.abandon()
    file.abandon()
    assert (tmp_path / "file").stat().st_size == 0


def test_the_end_of_a_file_that_no_disk_takes_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = HashingFile(tmp_path / "file")
    file.write(b"few bytes")
    monkeypatch.setattr(hashing_file.os, "write", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(OSError, match="full"):
        file.close()
    file.abandon()


def test_a_symbolic_link_in_its_place_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("data")
    (tmp_path / "file").symlink_to("victim")
    with pytest.raises(OSError, match="symbolic link"):
        HashingFile(tmp_path / "file")
    assert (tmp_path / "victim").read_text() == "data"


def test_a_named_pipe_in_its_place_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "file")
    with pytest.raises(OSError, match="No such device"):
        HashingFile(tmp_path / "file")
