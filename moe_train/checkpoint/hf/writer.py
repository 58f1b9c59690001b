"""Writes a directory of many files so that it appears whole or not at all, can be continued, and can be verified.

    .NAME.partial/        while it is being written, beside the target
        plan.json         what is being written; another plan starts anew
        done/FILE.json    a file that is complete: size, SHA-256, what the table of contents needs
    NAME/                 the same directory, renamed, with manifest.json

A file is written under a name of its own and renamed when it is on disk. `kill -9` at any moment leaves the hidden
directory, and the next try writes only what is not complete.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from moe_train.checkpoint.hf.workers import Team
from parallel.errors import CheckpointError, MoeTrainError

MANIFEST = "manifest.json"
_PLAN, _DONE, _LOCK = "plan.json", "done", ".lock"
_READ_BYTES = 1 << 22

Json = dict[str, Any]


class HashingFile:
    """A file that is written from start to end, and its SHA-256."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb", buffering=0)
        self.sha256, self.position = hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        """Append bytes."""
        view = memoryview(data).cast("B")
        self.sha256.update(view)
        done = 0
        while done < len(view):
            done += self._file.write(view[done:])
        self.position += len(view)
        return len(view)

    def write_tensor(self, tensor: Tensor) -> None:
        """Append the bytes of a tensor."""
        import torch

        self.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        """On disk when this returns."""
        os.fsync(self._file.fileno())
        self._file.close()

    def abandon(self) -> None:
        """Close without waiting for the disk."""
        self._file.close()


@dataclass(frozen=True)
class FileJob:
    """One file to write. `write` gets the open file and returns what the table of contents must know of it."""

    name: str
    bytes: int
    """About; for sharing the work and for the check of free space."""
    write: Callable[[HashingFile], Any]


@dataclass
class Plan:
    """A directory to write."""

    target: Path
    identity: Json
    """Everything that decides the bytes: an unfinished directory with another identity is thrown away."""
    jobs: list[FileJob]
    finish: Callable[[dict[str, Any]], dict[str, bytes]]
    """Small files (name -> content) from what the jobs returned, by name."""
    copies: dict[str, Path] = field(default_factory=dict)
    """Small files that are taken over: name -> source."""


@dataclass(frozen=True)
class Outcome:
    """What was written by all processes together."""

    files: int
    bytes: int
    reused: int
    """Files that an earlier try had completed."""


def partial_of(target: Path) -> Path:
    """Where `target` grows."""
    return target.parent / f".{target.name}.partial"


def run(plan: Plan, team: Team, threads: int, progress: Callable[[int], None] = lambda _: None) -> Outcome:
    """Write `plan` with `team`, `threads` files at a time in each process. `progress` gets the bytes of each file.

    Raises:
        CheckpointError: the target exists, is being written by another process, or does not fit on the disk. Files
            that were complete before a disk filled up are kept for the next try.
    """
    lock: list[Any] = []
    reused = team.broadcast(_attempt(lambda: _open(plan, lock)) if team.rank == 0 else None)
    _raise_first([reused])
    mine = _share(plan.jobs, team)
    results = team.gather(_attempt(lambda: _write_all(plan, mine, threads, progress)))
    if team.rank == 0 and any(r.error is not None and not r.resumable for r in results):
        shutil.rmtree(partial_of(plan.target))  # another try would fail at the same place
    _raise_first(results)
    outcome = team.broadcast(_attempt(lambda: _publish(plan, reused.value)) if team.rank == 0 else None)
    _raise_first([outcome])
    for descriptor in lock:
        os.close(descriptor)
    result: Outcome = outcome.value
    return result


@dataclass(frozen=True)
class _Result:
    value: Any = None
    error: MoeTrainError | None = None
    resumable: bool = False
    """Whether the same command can do better later."""


def _attempt(action: Callable[[], Any]) -> _Result:
    try:
        return _Result(action())
    except MoeTrainError as error:
        return _Result(error=type(error)(error.cause, error.remedy))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        remedy = "free space or mend permissions, and run the same command again: complete files are kept"
        return _Result(error=CheckpointError(f"cannot write {where}{error.strerror or error}", remedy), resumable=True)


def _raise_first(results: Iterable[_Result]) -> None:
    for result in results:
        if result.error is not None:
            raise result.error


def _open(plan: Plan, lock: list[Any]) -> int:
    """Prepare the hidden directory; returns how many files of it are complete."""
    if plan.target.exists():
        raise CheckpointError(f"{plan.target} exists", "name a directory that does not, or remove it first")
    partial = partial_of(plan.target)
    if not plan.target.parent.is_dir():
        plan.target.parent.mkdir(parents=True)
    descriptor = _locked(partial)
    identity = json.dumps(plan.identity, sort_keys=True, indent=1)
    plan_file = partial / _PLAN
    if not plan_file.is_file() or plan_file.read_text() != identity:
        for entry in partial.iterdir():
            if entry.name != _LOCK:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        _check_space(plan, set())
        (partial / _DONE).mkdir()
        _write_whole(plan_file, identity.encode())
    complete = set(_complete(plan, partial))
    for entry in partial.iterdir():
        if entry.name.endswith(".part"):
            entry.unlink()
    _check_space(plan, complete)
    lock.append(descriptor)
    return len(complete)


def _locked(partial: Path) -> int:
    created = not partial.exists()
    partial.mkdir(exist_ok=True)
    descriptor = os.open(partial / _LOCK, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise CheckpointError(
            f"{partial} is being written by another process", "wait for it, or name another target"
        ) from error
    if created:
        _sync_directory(partial.parent)
    return descriptor


def _check_space(plan: Plan, complete: set[str]) -> None:
    needed = sum(job.bytes for job in plan.jobs if job.name not in complete)
    usage = os.statvfs(plan.target.parent)
    free = usage.f_bavail * usage.f_frsize
    if needed > free:
        partial = partial_of(plan.target)
        if not complete:
            shutil.rmtree(partial)
        raise CheckpointError(
            f"{plan.target} needs {needed / 1e9:,.2f} GB, and {plan.target.parent} has {free / 1e9:,.2f} GB free",
            "free space, or name a target on another disk",
        )


def _complete(plan: Plan, partial: Path) -> Iterator[str]:
    for job in plan.jobs:
        record, file = partial / _DONE / f"{job.name}.json", partial / job.name
        if not record.is_file() or not file.is_file():
            continue
        try:
            size = json.loads(record.read_text())["bytes"]
        except (ValueError, KeyError):
            size = -1
        if file.stat().st_size == size:
            yield job.name


def _share(jobs: list[FileJob], team: Team) -> list[FileJob]:
    """The jobs of this rank. Files are about equally large, so every size-th one is a fair share."""
    return jobs[team.rank :: team.size]


def _write_all(plan: Plan, jobs: list[FileJob], threads: int, progress: Callable[[int], None]) -> None:
    partial = partial_of(plan.target)
    complete = set(_complete(plan, partial))
    stop = threading.Event()

    def work(job: FileJob) -> None:
        if job.name not in complete and not stop.is_set():
            _write_file(job, partial)
        progress(job.bytes)

    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(work, job) for job in jobs]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            stop.set()  # also for Ctrl-C
        for future in done:
            future.result()


def _write_file(job: FileJob, partial: Path) -> None:
    part = partial / f"{job.name}.part"
    file = HashingFile(part)
    try:
        facts = job.write(file)
        file.close()
        os.replace(part, partial / job.name)
        record = {"bytes": file.position, "sha256": file.sha256.hexdigest(), "facts": facts}
        _write_whole(partial / _DONE / f"{job.name}.json", json.dumps(record).encode())
    except BaseException:
        file.abandon()
        part.unlink(missing_ok=True)
        raise


def _publish(plan: Plan, reused: int) -> Outcome:
    partial = partial_of(plan.target)
    records = {job.name: json.loads((partial / _DONE / f"{job.name}.json").read_text()) for job in plan.jobs}
    small = plan.finish({name: record["facts"] for name, record in records.items()})
    small |= {name: path.read_bytes() for name, path in plan.copies.items() if name not in small}
    files = {name: {"bytes": record["bytes"], "sha256": record["sha256"]} for name, record in records.items()}
    for name, content in small.items():
        (partial / name).parent.mkdir(exist_ok=True)
        _write_whole(partial / name, content)
        files[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest = {"format": 1, "files": dict(sorted(files.items()))}
    _write_whole(partial / MANIFEST, json.dumps(manifest, indent=1).encode())
    shutil.rmtree(partial / _DONE)
    (partial / _PLAN).unlink()
    (partial / _LOCK).unlink()
    _sync_directory(partial)
    os.rename(partial, plan.target)
    _sync_directory(plan.target.parent)
    return Outcome(len(plan.jobs), sum(record["bytes"] for record in records.values()), reused)


def _write_whole(path: Path, content: bytes) -> None:
    part = path.with_name(path.name + ".part")
    file = HashingFile(part)
    file.write(content)
    file.close()
    os.replace(part, path)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def verify(directory: Path, threads: int, progress: Callable[[int], None] = lambda _: None) -> tuple[int, int]:
    """Compare every file with the manifest; returns how many files and bytes that were.

    Raises:
        CheckpointError: there is no manifest, or a file is missing, has another size or other bytes.
    """
    files = manifest_of(directory)
    with ThreadPoolExecutor(threads) as pool:
        for size in pool.map(lambda name: _check_file(directory / name, files[name]), files):
            progress(size)
    return len(files), sum(entry["bytes"] for entry in files.values())


def manifest_of(directory: Path) -> dict[str, Json]:
    """The files of a directory that `run` has written, with `bytes` and `sha256` of each."""
    path = directory / MANIFEST
    try:
        files: dict[str, Json] = json.loads(path.read_text(encoding="utf-8"))["files"]
        for name, entry in files.items():
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise ValueError(f"it names {name}")
            int(entry["bytes"]), str(entry["sha256"])
    except FileNotFoundError:
        raise CheckpointError(
            f"{directory} has no {MANIFEST}", "only directories that moe-convert has written can be verified"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}", "restore the file from a copy") from error
    return files


def _check_file(path: Path, entry: Json) -> int:
    restore = "restore the file from a copy, or convert again"
    try:
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise CheckpointError(f"{path} has {size:,} bytes, and the manifest says {entry['bytes']:,}", restore)
        digest = hashlib.sha256()
        with path.open("rb", buffering=0) as file:
            while block := file.read(_READ_BYTES):
                digest.update(block)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}", restore) from error
    if digest.hexdigest() != entry["sha256"]:
        raise CheckpointError(f"{path} is damaged: its bytes are not those that were written", restore)
    return size
