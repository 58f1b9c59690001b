"""Records of a run on a disk that fills up, is read-only for a while, or stays so."""

from __future__ import annotations

import errno
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from moe_train.telemetry.patient_file import PatientFile

ERRORS = (errno.ENOSPC, errno.EROFS, errno.ESTALE)


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file can be longer than 25 bytes, as if the disk were full then."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (25, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_each_record_is_in_the_file_at_once(tmp_path: Path) -> None:
    file = PatientFile(tmp_path / "lines")
    for number in range(3):
        file.write(f"line {number}\n")
        assert (tmp_path / "lines").read_text().count("\n") == number + 1
    file.close()


def test_a_record_that_was_cut_short_is_completed_when_there_is_space(
    tmp_path: Path, small_files: None, capsys: pytest.CaptureFixture[str]
) -> None:
    file = PatientFile(tmp_path / "lines")
    for number in range(6):
        file.write(f"line of {number}\n")  # 10 bytes: the third is cut in its middle
    assert (tmp_path / "lines").stat().st_size == 25
    assert capsys.readouterr().err == (
        f"warning: {tmp_path}/lines cannot be written: File too large; the run continues and buffers its lines\n"
    )
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    file.write("line of 6\n")
    assert (tmp_path / "lines").read_text() == "".join(f"line of {number}\n" for number in range(7))
    assert "can be written again: 5 lines came late, 0 were lost" in capsys.readouterr().err
    file.close()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("number", ERRORS)
def test_what_has_no_room_in_memory_is_counted(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, write = PatientFile(tmp_path / "lines", most_bytes=30), os.write

    def fail(descriptor: int, data: bytes) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "write", fail)
    for name in "abcde":
        file.write(f"line {name}...\n")
    assert file.lost == 2
    monkeypatch.setattr(os, "write", write)
    file.flush()
    assert (tmp_path / "lines").read_text() == "line a...\nline b...\nline c...\n"
    assert "3 lines came late, 2 were lost" in capsys.readouterr().err
    monkeypatch.setattr(os, "write", fail)
    file.write("line f\n")
    file.close()
    assert f"1 lines of {tmp_path}/lines are lost: {os.strerror(number)}" in capsys.readouterr().err


def test_a_file_that_cannot_be_made_is_made_later(tmp_path: Path) -> None:
    file = PatientFile(tmp_path / "there" / "lines")
    file.write("first\n")
    (tmp_path / "there").mkdir()
    file.write("second\n")
    assert (tmp_path / "there" / "lines").read_text() == "first\nsecond\n"
    file.close()
