"""Node-local checkpoints, which are written first and then copied to shared storage.

    local_dir/NAME-HASH/step_N/    on each node: the files of its ranks; on that of the first rank the small ones too

NAME-HASH stands for `checkpoint.dir`, so that runs do not mix. The manifest is written when every rank has written its
file: a checkpoint is complete where all files of its manifest are on some node. One that was not copied before the run
died is copied when the run continues; a node that is lost takes its files with it, and then the shared ones are used.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from moe_train.checkpoint import collective
from moe_train.files import atomic
from moe_train.formats import manifest, run_directory
from moe_train.run import Run
from parallel.errors import CheckpointError


def root_of(run: Run, shared: Path) -> Path | None:
    """This node's directory for the run with checkpoints in `shared`."""
    return run_directory.node_local_dir(run.cfg, shared)


def prepare(run: Run, shared: Path, step: int, own_bytes: int) -> Path | None:
    """This node's directory for the checkpoint of `step`; None where none is asked for or a node has no space for it.

    Checkpoints of this and later steps go: they are of a run that was set back. Every rank calls it.

    Raises:
        CheckpointError: it cannot be made.
    """
    root = root_of(run, shared)
    if root is None:
        return None

    def clear() -> None:
        if run.rank.local_rank == 0:
            root.mkdir(parents=True, exist_ok=True)
            for path in _steps(root):
                if run_directory.step_of(path.name) >= step:
                    shutil.rmtree(path)

    def make() -> float:
        path.mkdir(parents=True, exist_ok=True)
        return collective.free_bytes(path) - own_bytes * run.rank.local_world_size

    path = root / run_directory.name_of(step)
    collective.on_all_ranks(run, clear, f"write to {root}")
    spare = collective.on_all_ranks(run, make, f"write to {root}")
    free_bytes: list[Any] = [None] * run.layout.world_size
    dist.all_gather_object(free_bytes, spare)
    if min(free_bytes) >= 0:
        return path
    if run.rank.local_rank == 0:
        shutil.rmtree(path, ignore_errors=True)
    if run.is_main:
        collective.warn(f"{root} has no space on some node for the checkpoint of step {step}, which goes to {shared}")
    return None


def set_aside(run: Run, shared: Path) -> None:
    """Move what an earlier run left on the nodes' disks, where resume=never begins another one with the same `shared`.

    Its later steps would be taken for those of this run. Every rank calls it.

    Raises:
        CheckpointError: it cannot be moved.
    """
    root = root_of(run, shared)
    if root is None:
        return

    def move() -> None:
        if run.rank.local_rank == 0 and _steps(root):
            with suppress(FileNotFoundError):  # two nodes that share the disk
                os.rename(root, root.with_name(f"{root.name}.earlier_{time.time_ns()}"))

    collective.on_all_ranks(run, move, f"write to {root.parent}")


def copy(source: Path, target: Path, entry: manifest.Entry, stop: threading.Event | None = None) -> None:
    """Copy a file and compare what arrived with `entry`; it is on disk on return.

    Raises:
        CheckpointError: either is not what was written.
        OSError: the disk is full or not writable.
    """
    with target.open("wb", buffering=0) as file:

        def write(block: memoryview) -> None:
            if stop is not None and stop.is_set():
                raise CheckpointError("the run ended before the checkpoint was copied")
            while block:
                block = block[file.write(block) :]

        copied = manifest.entry_of(source, write)
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):  # have the bytes that arrived read, and not what is still in memory
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if copied != entry:
        raise CheckpointError(f"{source} is not what was written", "replace the disk, or set checkpoint.local_dir=null")
    if problem := manifest.difference(target, entry):
        raise CheckpointError(f"{target} {problem} after it was copied", "check the file system of checkpoint.dir")


def copy_small(source: Path, target: Path) -> None:
    """The files of a complete checkpoint that are in `source` and not yet in `target`; the manifest last."""
    for name, entry in (manifest.read(source) or {}).items():
        if not (target / name).is_file():
            copy(source / name, target / name, entry)
    content = (source / run_directory.MANIFEST).read_bytes()
    atomic.write_bytes(target / run_directory.MANIFEST, content, durable=True)


def prune(root: Path, count: int) -> None:
    """Remove all but the `count` newest checkpoints of this node's disk."""
    for path in sorted(_steps(root), key=lambda path: run_directory.step_of(path.name), reverse=True)[count:]:
        shutil.rmtree(path, ignore_errors=True)


def _steps(root: Path) -> list[Path]:
    return [path for path in root.iterdir() if run_directory.step_of(path.name) >= 0] if root.is_dir() else []


@dataclass(frozen=True)
class LocalCheckpoint:
    """A complete checkpoint on the nodes' own disks."""

    name: str
    files: manifest.Files
    sender: dict[str, int]
    """The rank that can copy a file."""


def find(run: Run, shared: Path) -> list[LocalCheckpoint]:
    """Complete checkpoints on the nodes' disks, newest first. Every rank calls it, and gets the same."""
    root = root_of(run, shared)
    if root is None:
        return []
    listings: list[Any] = [None] * run.layout.world_size
    first = run.rank.local_rank == 0
    dist.all_gather_object(listings, {path.name: _listing(path, first) for path in _steps(root)})
    names = {name for listing in listings for name in listing}
    joined = [_joined(name, [listing.get(name, ({}, None)) for listing in listings]) for name in names]
    complete = [entry for entry in joined if entry is not None]
    return sorted(complete, key=lambda entry: run_directory.step_of(entry.name), reverse=True)


def _listing(path: Path, with_manifest: bool) -> tuple[dict[str, int], manifest.Files | None]:
    """Sizes of the files of a node's part, and the manifest where it is there."""
    try:
        sizes = {entry.name: entry.stat().st_size for entry in os.scandir(path)}
        return sizes, manifest.read(path) if with_manifest else None
    except (OSError, CheckpointError):
        return {}, None


def _joined(name: str, parts: list[tuple[dict[str, int], manifest.Files | None]]) -> LocalCheckpoint | None:
    """The parts of all ranks as one checkpoint, if nothing of it is missing."""
    files = next((files for _, files in parts if files is not None), None)
    if files is None:
        return None
    sender: dict[str, int] = {}
    load = [0] * len(parts)
    for file, entry in files.items():
        able = [rank for rank, (sizes, _) in enumerate(parts) if sizes.get(file) == entry.bytes]
        if not able:
            return None
        sender[file] = min(able, key=load.__getitem__)
        load[sender[file]] += entry.bytes
    return LocalCheckpoint(name, files, sender)


def restore(run: Run, shared: Path, local_copy: LocalCheckpoint) -> Path:
    """Copy a checkpoint from the nodes' disks to `shared` and return it. Every rank calls it.

    Raises:
        CheckpointError: it is damaged or cannot be written. `shared` is unchanged.
    """
    root, final = root_of(run, shared), shared / local_copy.name
    hidden = collective.on_main(run, lambda: run_directory.prepare(shared, local_copy.name), f"write to {shared}")

    def send() -> None:
        for name, rank in local_copy.sender.items():
            if rank == run.rank.rank and root is not None:
                copy(root / local_copy.name / name, hidden / name, local_copy.files[name])

    def finish() -> Path:
        manifest.write(hidden, local_copy.files)
        return run_directory.publish(shared, local_copy.name)

    try:
        collective.on_all_ranks(run, send, f"write {final}")
        return collective.on_main(run, finish, f"write {final}")
    except CheckpointError:
        if run.is_main:
            shutil.rmtree(hidden, ignore_errors=True)
        raise
