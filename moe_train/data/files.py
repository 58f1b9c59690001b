"""The files of a corpus, in a fixed order. What is not read is counted."""

from __future__ import annotations

import glob
import os
import platform
import stat
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

from moe_train.config.schema import DataConfig
from moe_train.data.report import Reason, Report
from parallel.errors import DataError

PLAIN_TEXT = (".txt", ".md")
WARC = (".warc", ".warc.gz", ".warc.zst", ".warc.wet", ".warc.wet.gz")
SUFFIXES = (*PLAIN_TEXT, *WARC, ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")

# Tables and generated text, a few files of megabytes, would otherwise be a large part of the corpus.
_LARGEST_STDLIB_FILE_BYTES = 300_000
_NOT_STDLIB = {"site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data"}


@dataclass(frozen=True)
class Source:
    """Text of which one dataset is made.

    Attributes:
        name: of an entry of `data.sources`; "" where there is only one text.
        data: the configuration with the path and the key of the text.
        files: in a fixed order.
    """

    name: str
    data: DataConfig
    files: tuple[Path, ...]


def sources_of(data: DataConfig, report: Report | None = None) -> list[Source]:
    """The texts of `data.sources`, or the one at `data.path`. Arguments and errors: as `source_files`."""
    if not data.sources:
        return [Source("", data, tuple(source_files(data, report)))]
    found = []
    for entry in data.sources:
        own = replace(data, path=entry.path, text_key=entry.text_key or data.text_key, sources=[])
        try:
            found.append(Source(entry.name, own, tuple(source_files(own, report))))
        except DataError as error:
            raise DataError(f"data.sources: {entry.name}: {error.cause}", error.remedy) from error
    return found


def source_files(data: DataConfig, report: Report | None = None) -> list[Path]:
    """Files of the corpus at `data.path` in a fixed order.

    Args:
        report: counts what is not read.

    Raises:
        DataError: there are none, one that is named has an unknown suffix, or a directory cannot be read.
    """
    report = report if report is not None else Report()
    if data.source == "stdlib":
        return _stdlib_files(report)
    if not data.path:
        raise DataError("data.path is not set", f"set data.path to a file, directory or glob of {', '.join(SUFFIXES)}")
    path = Path(data.path)
    if path.is_dir():
        candidates = []
        for file in _walk(path, data.follow_links, report):
            if file.name.endswith(SUFFIXES):
                candidates.append(file)
            else:
                report.add(Reason.OTHER_KIND, file)
    else:
        candidates = [path] if path.is_file() else [Path(name) for name in glob.glob(data.path, recursive=True)]
        for directory in filter(Path.is_dir, candidates):
            report.add(Reason.DIRECTORY, directory)
        candidates = [file for file in candidates if not file.is_dir()]
        for file in candidates:
            if not file.name.endswith(SUFFIXES):
                raise DataError(f"{file} is of an unknown kind", f"name it as one of {', '.join(SUFFIXES)}")
    files = list(_readable(sorted(candidates), Path(data.dir).resolve(), report))
    if not files:
        left_out = "".join(f"; {count} {reason.value[0]}" for reason, count in report.counts.items())
        raise DataError(f"data.path={data.path} has no {', '.join(SUFFIXES)} file{left_out}", "correct data.path")
    return files


def _walk(root: Path, follow: bool, report: Report) -> Iterator[Path]:
    """Files, links and special files under `root`. A directory with several paths is entered once."""
    waiting, links, entered = [root], list[Path](), set[tuple[int, int]]()
    while waiting or links:
        directory = waiting.pop() if waiting else links.pop(0)  # by its own path first, where it has one in `root`
        if _place(directory) in entered:
            report.add(Reason.SECOND_PATH, directory)
            continue
        entered.add(_place(directory))
        try:
            entries = sorted(os.scandir(directory), key=lambda entry: entry.name)
        except OSError as error:
            raise DataError(
                f"{directory} cannot be read: {error.strerror}", "make it readable or narrow data.path"
            ) from error
        for entry in entries:
            path = Path(entry.path)
            if not path.is_dir():
                yield path
            elif not entry.is_symlink():
                waiting.append(path)
            elif follow:
                links.append(path)
            else:
                report.add(Reason.LINKED_DIRECTORY, path)


def _place(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _readable(candidates: list[Path], own: Path, report: Report) -> Iterator[Path]:
    """Regular files with text, each once, that are not of the dataset itself."""
    seen: set[tuple[int, int]] = set()
    for file in candidates:
        try:
            status = file.stat()
        except OSError:
            report.add(Reason.BROKEN_LINK, file)
            continue
        place = (status.st_dev, status.st_ino)
        if not stat.S_ISREG(status.st_mode):
            report.add(Reason.NOT_REGULAR, file)
        elif own in file.resolve().parents:  # a dataset inside the directory of its text is not text
            report.add(Reason.OWN, file)
        elif place in seen:
            report.add(Reason.SECOND_PATH, file)
        elif status.st_size == 0:
            report.add(Reason.EMPTY_FILE, file)
        else:
            seen.add(place)
            yield file


def _stdlib_root() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _stdlib_files(report: Report) -> list[Path]:
    root = _stdlib_root()
    files = []
    for file in sorted(f for f in root.rglob("*.py") if not _NOT_STDLIB & set(f.relative_to(root).parts)):
        size = file.stat().st_size
        if size > _LARGEST_STDLIB_FILE_BYTES:
            report.add(Reason.LARGE, file)
        elif size == 0:
            report.add(Reason.EMPTY_FILE, file)
        else:
            files.append(file)
    return files


def fingerprint(data: DataConfig, files: Sequence[Path]) -> str:
    """Changes when the corpus does: names, sizes and times of the files (of the standard library, Python's version)."""
    digest = sha256()
    if data.source == "stdlib":
        digest.update(platform.python_version().encode())
        lines = [f"{file.relative_to(_stdlib_root())}|{file.stat().st_size}" for file in files]
    else:
        lines = [f"{file}|{file.stat().st_size}|{file.stat().st_mtime_ns}" for file in files]
    digest.update("\n".join(lines).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
