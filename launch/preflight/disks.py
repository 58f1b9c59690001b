"""Directories that a run writes: what it will write there, what is free, and how fast they are. No torch import."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import time
from dataclasses import dataclass
from pathlib import Path

from launch import env
from moe_train.config.resolve import total_steps
from moe_train.config.schema import Config
from moe_train.formats import run_directory
from moe_train.model.memory import checkpoint_bytes, workload_of
from parallel.layout import ParallelLayout

MIB = 1 << 20
_OWN_FILES = 100 * MIB  # metrics, logs and reports of a run; what a rank compiles
_LONGEST_S = 5.0  # of writing, and of reading
_FEWEST_INODES = 100
FOLDER = ".preflight"


@dataclass(frozen=True)
class StoragePlace:
    """A directory that the run writes.

    Args:
        field: of the config, which names it.
        path: where it is.
        shared: whether all nodes have the same one.
        least_bytes: without which the run cannot continue for long: its own files and the next checkpoints.
        all_bytes: that it will write until its end, less what it removes.
    """

    field: str
    path: Path
    shared: bool
    least_bytes: int
    all_bytes: int


@dataclass(frozen=True)
class Disk:
    """What a node finds in a `StoragePlace`.

    Args:
        problem: why nothing can be written there; "" where it can.
        free_bytes: for this user.
        write_mb_s, read_mb_s: past the cache of this node, where the file system allows it; None with a problem.
    """

    field: str
    path: str
    shared: bool
    least_bytes: int
    all_bytes: int
    problem: str = ""
    free_bytes: int = 0
    write_mb_s: float | None = None
    read_mb_s: float | None = None


def places(cfg: Config, layout: ParallelLayout, local_world_size: int) -> list[StoragePlace]:
    """Directories of `cfg` that a node with `local_world_size` ranks writes."""
    size = int(checkpoint_bytes(cfg, workload_of(cfg, layout)))
    root = cfg.checkpoint_root
    to_come = checkpoints_to_come(cfg, _newest(root), _count(root))
    least, whole = size * min(to_come, 2), size * to_come
    inside = cfg.checkpoint.dir is None
    result = [
        StoragePlace("run_dir", Path(cfg.run_dir), True, _OWN_FILES + inside * least, _OWN_FILES + inside * whole),
    ]
    if not inside:
        result.append(StoragePlace("checkpoint.dir", root, True, least, whole))
    near = run_directory.node_local_dir(cfg, root)
    if near is not None:
        here = size * local_world_size // layout.world_size
        retained = min(to_come, cfg.checkpoint.local_keep + 1)
        still = here * max(retained - _count(near), min(retained, 1))
        result.append(StoragePlace("checkpoint.local_dir", near, False, still, still))
    scratch = env.own_scratch(cfg.launcher)
    if scratch is not None:
        needed = _OWN_FILES * local_world_size
        result.append(StoragePlace("launcher.scratch_dir", scratch, False, needed, needed))
    return result


def checkpoints_to_come(cfg: Config, newest: int, present: int) -> int:
    """By how many checkpoints the directory will grow at most, with `present` in it up to step `newest`.

    A checkpoint is written before the oldest that is not kept goes.
    """
    settings, total = cfg.checkpoint, total_steps(cfg)
    done = 0 if cfg.resume == "never" else max(newest, 0)
    if done >= total:
        return 0
    interval = settings.interval_steps
    if not interval:
        return 1  # at the end, or as the time limit comes near
    written = total // interval - done // interval + (settings.save_at_end and total % interval > 0)
    if settings.keep_last is None:
        return max(written, 1)
    stay = total // settings.keep_every - done // settings.keep_every if settings.keep_every else 0
    return max(1, min(written, settings.keep_last + 1 - present + stay))


def _newest(root: Path) -> int:
    return max((run_directory.step_of(path.name) for path in _steps(root)), default=-1)


def _count(root: Path) -> int:
    return len(_steps(root))


def _steps(root: Path) -> list[Path]:
    with contextlib.suppress(OSError):
        return [path for path in root.iterdir() if run_directory.step_of(path.name) >= 0]
    return []


def look(place: StoragePlace, name: str, megabytes: int) -> Disk:
    """Write a file `name` of at most `megabytes` to the folder `FOLDER` of a place, and read it. It stays.

    It takes no more than an eighth of what is free, so that it harms no run that writes there.
    """
    facts = {"field": place.field, "path": str(place.path), "shared": place.shared}
    needed = {"least_bytes": place.least_bytes, "all_bytes": place.all_bytes}
    free = 0
    try:
        own = place.path / FOLDER / name
        own.parent.mkdir(parents=True, exist_ok=True)
        usage = os.statvfs(own.parent)
        free = usage.f_bavail * usage.f_frsize
        if usage.f_files and usage.f_favail < _FEWEST_INODES:
            raise OSError(errno.ENOSPC, f"No space left on device ({usage.f_favail} files can be made)")
        blocks = max(1, min(megabytes, free // 8 // MIB))
        write_mb_s, written = _write(own, blocks)
        read_mb_s = _read(own, written)
    except OSError as error:
        return Disk(**facts, **needed, problem=error.strerror or str(error), free_bytes=free)  # type: ignore[arg-type]
    return Disk(**facts, **needed, free_bytes=free, write_mb_s=write_mb_s, read_mb_s=read_mb_s)  # type: ignore[arg-type]


def remove(place: StoragePlace, name: str) -> None:
    """Remove the file that `look` has written, and the folder where it was the last."""
    with contextlib.suppress(OSError):
        (place.path / FOLDER / name).unlink(missing_ok=True)
        (place.path / FOLDER).rmdir()


def _write(path: Path, blocks: int) -> tuple[float, int]:
    """MB/s until everything is on disk, and the number of blocks that were written in time."""
    block = mmap.mmap(-1, MIB)  # aligned, as direct writes want it
    block.write(os.urandom(MIB))
    file = _open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        began, written = time.perf_counter(), 0
        while written < blocks and time.perf_counter() - began < _LONGEST_S:
            if os.write(file, block) < MIB:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            written += 1
        os.fsync(file)
        return _rate(written, began), written
    finally:
        os.close(file)


def _read(path: Path, blocks: int) -> float:
    block = mmap.mmap(-1, MIB)
    file = _open(path, os.O_RDONLY)
    try:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        began, read = time.perf_counter(), 0
        while read < blocks and time.perf_counter() - began < _LONGEST_S:
            if os.readv(file, [block]) < MIB:
                raise OSError(errno.EIO, "a file is shorter than it was written")
            read += 1
        return _rate(read, began)
    finally:
        os.close(file)


def _rate(blocks: int, began: float) -> float:
    return blocks * MIB / 1e6 / max(time.perf_counter() - began, 1e-9)


def _open(path: Path, flags: int) -> int:
    """Past the page cache where the file system can: what is read back would else come from memory."""
    try:
        return os.open(path, flags | getattr(os, "O_DIRECT", 0), 0o644)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags, 0o644)
