"""Writes a directory of many files so that it appears whole or not at all, can be continued, and can be verified.

    .NAME.partial/            while it is being written, next to the target
        .writing/lock         held by the process that writes
        .writing/plan.json    what is being written; for another plan everything is written again
        .writing/done/F.json  the file F is complete: size, SHA-256, what the table of contents needs
    NAME/                     the same directory, renamed, with manifest.json

A file is written under a hidden name and renamed when it is on disk. `kill -9` at any moment leaves the hidden
directory, and the next try writes only what is not complete. No file that is written has a hidden name but `.metadata`,
so that files of the source with any name cannot collide with the bookkeeping. No symbolic link is followed: a user who
can put one next to the target would choose the file that is overwritten.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import stat
import threading
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from moe_train.files import atomic, untrusted
from moe_train.formats.communicator import Communicator
from moe_train.formats.hashing_file import HashingFile
from moe_train.formats.nonfinite import Places, Tally, entry_of
from moe_train.formats.run_directory import MANIFEST
from parallel.errors import CheckpointError, MoeTrainError

_BOOKKEEPING, _PLAN, _DONE, _LOCK, _PART = ".writing", "plan.json", "done", "lock", ".part"

Json = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class FileJob:
    """One file to write. `write` gets the open file and returns what the table of contents must know of it."""

    name: str
    bytes: int
    """About; for sharing the work and for the check of free space."""
    write: Callable[[HashingFile], Any]


@dataclass
class WritePlan:
    """A directory to write."""

    target: Path
    identity: Json
    """Everything that decides the bytes: an unfinished directory with another identity is deleted."""
    jobs: list[FileJob]
    finish: Callable[[dict[str, Any]], dict[str, bytes]]
    """Small files (name -> content) from what the jobs returned, by name."""
    copies: dict[str, Path] = field(default_factory=dict)
    """Small files that are taken over: name -> source."""
    notes: list[str] = field(default_factory=list)
    """What the user should know of the files that this process has written."""
    remarks: list[str] = field(default_factory=list)
    """What the user should know of the target."""


@dataclass(frozen=True)
class WriteResult:
    """Totals of what all ranks wrote."""

    files: int
    bytes: int
    reused: int
    """Files that an earlier try had completed."""


def partial_of(target: Path) -> Path:
    """Where `target` grows."""
    return target.parent / f".{target.name}.partial"


def run(
    plan: WritePlan, comm: Communicator, threads: int, progress: Callable[[int], None] = lambda _: None
) -> WriteResult:
    """Write `plan` with `comm`, `threads` files at a time in each process. `progress` gets the bytes of each file.

    Raises:
        CheckpointError: the target exists, is being written by another process, or does not fit on the disk. Files
            that were complete before a disk filled up are kept for the next try. Every rank raises the same error.
    """
    locks: list[int] = []
    try:
        opened = comm.broadcast(_attempt(lambda: _open(plan, locks), comm) if comm.rank == 0 else None)
        _raise_first(plan, comm, locks, [opened])
        mine = _share(plan.jobs, comm)
        _raise_first(
            plan, comm, locks, comm.all_gather(_attempt(lambda: _write_all(plan, mine, threads, progress), comm))
        )
        outcome = comm.broadcast(_attempt(lambda: _publish(plan, opened.value), comm) if comm.rank == 0 else None)
        _raise_first(plan, comm, locks, [outcome])
    finally:
        for descriptor in locks:
            os.close(descriptor)
    result: WriteResult = outcome.value
    return result


def together(comm: Communicator, action: Callable[[], T]) -> T:
    """Result of `action`, which every rank does. If it fails on any rank, every rank raises the first one's error.

    A rank that left alone would block the others forever.
    """
    result = _attempt(action, comm)
    for error in comm.all_gather(result.error):
        if error is not None:
            raise error
    value: T = result.value
    return value


@dataclass(frozen=True)
class _Result:
    value: Any = None
    error: MoeTrainError | None = None
    resumable: bool = False
    """Whether the same command can do better later."""


def _attempt(action: Callable[[], Any], comm: Communicator) -> _Result:
    try:
        return _Result(action())
    except MoeTrainError as error:
        return _Result(error=error.copied())
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        remedy = "free space or correct permissions and run the same command again (or name another target)"
        return _Result(error=CheckpointError(f"{where}{error.strerror or error}", remedy), resumable=True)
    except Exception as error:
        if comm.size == 1:
            raise
        frame = traceback.extract_tb(error.__traceback__)[-1]
        cause = f"rank {comm.rank}: {type(error).__name__}: {error} ({frame.filename}:{frame.lineno})"
        return _Result(error=MoeTrainError(cause, "this is a bug: run one process to see where"), resumable=True)


def _raise_first(plan: WritePlan, comm: Communicator, locks: list[int], results: Iterable[_Result]) -> None:
    """Raise the first error on every rank, after the first rank has cleared away what no other try can use."""
    failed = [result for result in results if result.error is not None]
    if failed:
        raise comm.broadcast(_given_up(plan, locks, failed) if comm.rank == 0 else None)


def _given_up(plan: WritePlan, locks: list[int], failed: list[_Result]) -> MoeTrainError:
    first = next((result for result in failed if not result.resumable), failed[0])
    error = first.error or CheckpointError(f"{plan.target} was not written")
    if not locks:  # the hidden directory is another process's
        return error
    partial = partial_of(plan.target)
    complete = len(list(_complete(plan, partial))) if first.resumable else 0
    if not complete:
        shutil.rmtree(partial, ignore_errors=True)  # it refuses a symbolic link
        return error
    return error.copied(f"{error.remedy}: the {complete} complete files in {partial} are kept for it")


def _open(plan: WritePlan, locks: list[int]) -> int:
    """Prepare the hidden directory; returns how many files of it are complete. `locks` gets the lock on it."""
    refuse_existing(plan.target)
    partial = partial_of(plan.target)
    plan.target.parent.mkdir(parents=True, exist_ok=True)
    locks.append(_locked(partial))
    refuse_existing(plan.target)  # another process has finished it while this one waited for nothing
    identity = json.dumps(plan.identity, sort_keys=True, indent=1)
    bookkeeping = partial / _BOOKKEEPING
    if not _says(bookkeeping / _PLAN, identity):
        for entry in [*partial.iterdir(), *bookkeeping.iterdir()]:
            if entry not in (bookkeeping, bookkeeping / _LOCK):
                _remove(entry)
        _check_space(plan, set())
        (bookkeeping / _DONE).mkdir()
        _write_whole(bookkeeping / _PLAN, identity.encode())
    _make_own(bookkeeping / _DONE)
    for entry in [*partial.iterdir(), *(bookkeeping / _DONE).iterdir()]:
        if entry.name.endswith(_PART):
            _remove(entry)
    complete = set(_complete(plan, partial))
    _check_space(plan, complete)
    return len(complete)


def refuse_existing(target: Path) -> None:
    """Raise CheckpointError where there is something that would have to be overwritten."""
    if os.path.lexists(target):
        raise CheckpointError(f"{target} exists", "name a directory that does not, or remove it first")


def _says(file: Path, text: str) -> bool:
    return _is_file(file) and file.read_bytes() == text.encode()


def _is_file(path: Path) -> bool:
    """Whether it is a file itself, and not a link to one."""
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except OSError:
        return False


def _remove(path: Path) -> None:
    """Remove a file, a link or a directory; what a link leads to stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _make_own(directory: Path) -> bool:
    """Make a directory where there is none; whether there was none."""
    try:
        directory.mkdir()
    except FileExistsError:
        if not stat.S_ISDIR(os.lstat(directory).st_mode):
            raise CheckpointError(
                f"{directory} is not a directory, and files are collected in a directory of that name",
                "remove it, or name another target",
            ) from None
        return False
    return True


def _locked(partial: Path) -> int:
    created, lock = _make_own(partial), partial / _BOOKKEEPING / _LOCK
    _make_own(partial / _BOOKKEEPING)
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(descriptor), os.lstat(lock)):
            raise FileExistsError(f"{partial} was replaced")
    except OSError as error:
        os.close(descriptor)
        raise CheckpointError(
            f"{partial} is being written by another process", "wait for it, or name another target"
        ) from error
    if created:
        atomic.sync(partial.parent)
    return descriptor


def _check_space(plan: WritePlan, complete: set[str]) -> None:
    needed = sum(job.bytes for job in plan.jobs if job.name not in complete)
    usage = os.statvfs(plan.target.parent)
    free = usage.f_bavail * usage.f_frsize
    if needed > free:
        raise CheckpointError(
            f"{plan.target} needs {needed / 1e9:,.2f} GB, and {plan.target.parent} has {free / 1e9:,.2f} GB free",
            "free space, or name a target on another disk",
        )


def _complete(plan: WritePlan, partial: Path) -> Iterator[str]:
    for job in plan.jobs:
        file, record = partial / job.name, _record_of(job, partial)
        if record is not None and _is_file(file) and file.stat().st_size == record["bytes"]:
            yield job.name


def _record_path(job: FileJob, partial: Path) -> Path:
    return partial / _BOOKKEEPING / _DONE / f"{job.name}.json"


def _record_of(job: FileJob, partial: Path) -> Json | None:
    """What is noted of a file that is complete; None where it is not, or the note is cut off."""
    path = _record_path(job, partial)
    if not _is_file(path):
        return None
    try:
        record: Json = untrusted.read_json(path)
        return record if record.keys() == {"bytes", "sha256", "facts"} else None
    except (ValueError, AttributeError):
        return None


def _share(jobs: list[FileJob], comm: Communicator) -> list[FileJob]:
    """The jobs of this rank. Files are about equally large, so every size-th one is a fair share."""
    return jobs[comm.rank :: comm.size]


def _write_all(plan: WritePlan, jobs: list[FileJob], threads: int, progress: Callable[[int], None]) -> None:
    partial = partial_of(plan.target)
    complete = set(_complete(plan, partial))
    progress(sum(job.bytes for job in jobs if job.name in complete))
    missing = iter([job for job in jobs if job.name not in complete])
    stop = threading.Event()

    def work() -> None:
        while (job := None if stop.is_set() else next(missing, None)) is not None:
            try:
                _write_file(job, partial)
            except BaseException:
                stop.set()  # before another file begins
                raise
            progress(job.bytes)

    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(work) for _ in range(threads)]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            stop.set()  # also for Ctrl-C
        for future in done:
            future.result()


def _write_file(job: FileJob, partial: Path) -> None:
    part = _part_of(partial / job.name)
    file = HashingFile(part)
    try:
        facts = job.write(file)
        file.close()
        os.replace(part, partial / job.name)
        record = {"bytes": file.position, "sha256": file.sha256.hexdigest(), "facts": facts}
        # A record that a power cut takes away or leaves empty only has its file written again.
        _write_whole(_record_path(job, partial), json.dumps(record).encode(), wait=False)
    except BaseException as error:
        file.abandon()
        part.unlink(missing_ok=True)
        cause = file.error or error
        if isinstance(cause, OSError) and cause.filename is None:
            cause.filename = str(partial / job.name)  # write() does not know it
        raise cause from None


def _publish(plan: WritePlan, reused: int) -> WriteResult:
    partial = partial_of(plan.target)
    records = {job.name: untrusted.read_json(_record_path(job, partial)) for job in plan.jobs}
    small = plan.finish({name: record["facts"] for name, record in records.items()})
    small |= {name: path.read_bytes() for name, path in plan.copies.items() if name not in small}
    files = {name: {"bytes": record["bytes"], "sha256": record["sha256"]} for name, record in records.items()}
    for name, content in small.items():
        if Path(name).parent.name:
            _make_own((partial / name).parent)
        _write_whole(partial / name, content)
        files[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest = {"format": 1, "files": dict(sorted(files.items()))}
    _write_whole(partial / MANIFEST, json.dumps(manifest, indent=1).encode())
    bookkeeping = partial / _BOOKKEEPING
    # First: without it everything is written again; a plan without its records never ends.
    (bookkeeping / _PLAN).unlink()
    shutil.rmtree(bookkeeping / _DONE)
    for directory in {partial / Path(name).parent for name in files} | {partial}:
        atomic.sync(directory)
    os.rename(partial, plan.target)
    # Only now: without the lock another process would take the hidden directory.
    shutil.rmtree(plan.target / _BOOKKEEPING)
    atomic.sync(plan.target.parent)
    return WriteResult(len(plan.jobs), sum(record["bytes"] for record in records.values()), reused)


def _part_of(path: Path) -> Path:
    """Where a file grows. Unlike in `files/atomic.py`, the name is not random: the lock admits one writer, and the next
    one overwrites or removes what a killed one left."""
    return path.with_name(f".{path.name}{_PART}")


def _write_whole(path: Path, content: bytes, wait: bool = True) -> None:
    part = _part_of(path)
    file = HashingFile(part)
    try:
        file.write(content)
        file.close(wait)
        os.replace(part, path)
    except OSError as error:
        file.abandon()
        error.filename = str(path)
        raise


def verify(
    directory: Path, threads: int, progress: Callable[[int], None] = lambda _: None, rank: int = 0, size: int = 1,
    leave_out: Collection[str] = (), places: Mapping[str, Places] | None = None, tally: Tally | None = None,
) -> tuple[int, int]:  # fmt: skip
    """Compare every file but those to `leave_out` with the manifest; returns how many files and bytes that were. Of
    `size` processes each compares its share. `tally` gets the numbers that are not finite in the tensors at `places`.

    Raises:
        CheckpointError: there is no manifest, or a file is missing, has another size or other bytes.
    """
    files = {name: entry for name, entry in manifest_of(directory).items() if name not in leave_out}
    files = dict(list(files.items())[rank::size])
    with ThreadPoolExecutor(threads) as pool:
        work = pool.map(lambda name: _check_file(directory / name, files[name], (places or {}).get(name, ())), files)
        for checked, counts in work:
            progress(checked)
            if tally is not None:
                tally.merge(counts.found)
    return len(files), sum(entry["bytes"] for entry in files.values())


def manifest_of(directory: Path) -> dict[str, Json]:
    """The files of a directory that `run` has written, with `bytes` and `sha256` of each."""
    path = directory / MANIFEST
    try:
        files: dict[str, Json] = untrusted.read_json(path)["files"]
        for name, entry in files.items():
            if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
                raise ValueError(f"it names {name}")
            if type(entry["bytes"]) is not int or type(entry["sha256"]) is not str:
                raise ValueError(f"the entry of {name} has no size and digest")
    except FileNotFoundError:
        raise CheckpointError(
            f"{directory} has no {MANIFEST}",
            "name a checkpoint (runs/NAME/checkpoints/step_N), or a directory that moe-convert has written",
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}", "restore the file from a copy") from error
    return files


def _check_file(path: Path, entry: Json, places: Places) -> tuple[int, Tally]:
    restore = "restore the file from a copy, or convert again"
    try:
        size = os.stat(path).st_size
        if size != entry["bytes"]:
            raise CheckpointError(f"{path} has {size:,} bytes, and the manifest says {entry['bytes']:,}", restore)
        actual, tally = entry_of(path, places)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}", restore) from error
    if actual.sha256 != entry["sha256"]:
        raise CheckpointError(f"{path} is damaged: its bytes are not those that were written", restore)
    return size, tally
