"""A checkpoint that is being written, while training continues (asynchronous save) or waits.

Saving is a row of stages. Every rank does its part of a stage in a thread of its own; when all have, the ranks exchange
what came of it, in the main thread and between two steps, and begin the next. No thread talks to another rank: two
threads of a rank would meet in one process group in another order than elsewhere.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moe_train.checkpoint import collective, node_local, retention
from moe_train.checkpoint.collective import ActionResult
from moe_train.checkpoint.storage import Share, Written
from moe_train.formats import dcp_metadata, manifest, run_directory
from moe_train.run import Run
from parallel.errors import CheckpointError, MoeTrainError

_POLL_S = 0.05
"""How long a waiting rank lets pass before it asks the others again. They must not wait in a collective meanwhile:
that ends with an error after launcher.timeout_s, and the slowest disk may take longer."""

Stages = Generator[tuple[str, Callable[[], Any]], list[Any], None]


@dataclass
class SaveJob:
    """This rank's part in saving one checkpoint."""

    run: Run
    root: Path
    step: int
    share: Share
    small: dict[str, str]
    """Small text files: name -> content."""
    local_dir: Path | None
    """Directory on this node's disk that is written first."""
    stop: threading.Event = field(default_factory=threading.Event)
    written: list[Written] = field(default_factory=list)
    """What every rank has written. On the first rank only."""
    local_complete: bool = False
    mine: manifest.Files = field(default_factory=dict)
    """Files of this rank."""
    bytes: int = 0
    """Of the complete checkpoint. On the first rank only."""

    @property
    def final(self) -> Path:
        """The checkpoint's directory when it is complete."""
        return self.root / run_directory.name_of(self.step)

    @property
    def hidden(self) -> Path:
        """Where it grows."""
        return run_directory.partial_of(self.root, self.final.name)

    def stages(self) -> Stages:
        """What to do, one after the other, with what to call it. Each is sent what the one before returned."""
        self.written = yield f"write {self.local_dir or self.final}", self.write
        if self.local_dir is not None:
            yield f"write {self.local_dir}", self.complete_local
            self.local_complete = True
            yield f"write {self.final}", self.send
        yield f"write {self.final}", self.publish

    def write(self) -> Written:
        """This rank's file."""
        where = self.local_dir or self.hidden
        try:
            written = self.share.write(where, self.stop)
        except OSError as error:
            if not collective.full_disk(error):
                raise
            needed, free = self.share.bytes / 1e9, collective.free_bytes(where) / 1e9
            raise CheckpointError(
                f"cannot write {where / self.share.file}: {error.strerror}: this rank needs {needed:,.3f} GB, and "
                f"{free:,.3f} GB are free", collective.REMEDY,
            ) from error  # fmt: skip
        self.mine = written.files
        self.share = Share(self.share.file, [], self.share.table)  # the copies are not needed any more
        return written

    def complete(self, where: Path) -> None:
        """On the first rank: the small files, and the manifest of everything."""
        self.share.write_table(where, self.written)
        for name, content in self.small.items():
            (where / name).write_text(content)
        files: manifest.Files = {}
        for part in self.written:
            files |= part.files
        files = manifest.describe(where, files)
        self.bytes = sum(entry.bytes for entry in files.values())
        manifest.write(where, files)

    def complete_local(self) -> None:
        """With its manifest, the checkpoint on the nodes' disks is complete."""
        if self.run.is_main and self.local_dir is not None:
            self.complete(self.local_dir)

    def send(self) -> None:
        """This rank's file from the node's disk to where all checkpoints are."""
        for name, entry in self.mine.items():
            if self.local_dir is not None:
                node_local.copy(self.local_dir / name, self.hidden / name, entry, self.stop)

    def publish(self) -> None:
        """On the first rank: give the complete checkpoint its name, and remove those that are not kept."""
        settings = self.run.cfg.checkpoint
        if self.run.is_main:
            if self.local_dir is None:
                self.complete(self.hidden)
            else:
                node_local.copy_small(self.local_dir, self.hidden)
            check_complete(self.hidden)
            run_directory.publish(self.root, self.final.name)
            try:
                retention.apply(self.root, settings.keep_last, settings.keep_every)
            except OSError as error:  # what was saved is saved
                collective.warn(f"cannot remove a checkpoint that retention removes: {error}")
        if self.local_dir is not None and self.run.rank.local_rank == 0:
            node_local.prune(self.local_dir.parent, settings.local_keep)

    def undo(self) -> None:
        """Remove what was written of a checkpoint that failed. What is complete on the nodes' disks stays."""
        if self.run.is_main:
            shutil.rmtree(self.hidden, ignore_errors=True)
        if self.local_dir is not None and not self.local_complete and self.run.rank.local_rank == 0:
            shutil.rmtree(self.local_dir, ignore_errors=True)


def check_complete(path: Path) -> None:
    """Nothing is published that could not be read.

    Raises:
        CheckpointError: a file is missing or too short, or the table of contents cannot be read.
    """
    for name, entry in (manifest.read(path) or {}).items():
        if os.stat(path / name).st_size != entry.bytes:
            raise run_directory.damaged(path, f"{name} has not all of the {entry.bytes:,} bytes that were written")
    dcp_metadata.read(path)


class Saving:
    """A checkpoint that is being written. Every rank makes the same calls in the same steps."""

    def __init__(self, job: SaveJob) -> None:
        self.job = job
        self._began = time.monotonic()
        self.seconds = 0.0
        """From the beginning to the end."""
        self._stages = job.stages()
        self._begin(next(self._stages))

    def advance(self) -> bool:
        """Start the next stage if every rank has finished this one; returns whether everything is done.

        Raises:
            CheckpointError: on every rank, where a rank could not write. Nothing of the checkpoint is left.
        """
        running = self._thread is not None and self._thread.is_alive()
        done = torch.tensor(float(not running), device=self.job.run.device)
        dist.all_reduce(done, op=dist.ReduceOp.MIN)
        if not done.item():
            return False
        try:
            values = collective.gathered(self.job.run, self._outcome)
        except MoeTrainError:
            self.job.undo()
            raise
        try:
            self._begin(self._stages.send(values))
        except StopIteration:
            self.seconds = time.monotonic() - self._began
            return True
        return False

    def wait(self) -> Path:
        """Wait until everything is done; returns the checkpoint's directory. Raises as `advance`."""
        self._join()
        while not self.advance():
            self._join()
        return self.job.final

    def abandon(self) -> None:
        """Have this rank's thread end soon, where ranks do not agree any more. The checkpoint appears only if
        all that was left was to give it its name."""
        self.job.stop.set()
        self._join()

    def _begin(self, stage: tuple[str, Callable[[], Any]]) -> None:
        description, action = stage
        self._outcome = ActionResult()

        def work() -> None:
            self._outcome = collective.attempt_aside(action, description)

        thread = threading.Thread(target=work, name="checkpoint", daemon=True)
        self._thread: threading.Thread | None = thread
        try:
            thread.start()
        except RuntimeError as error:  # an exception here would leave the other ranks waiting in their next collective
            self._thread, self._outcome = None, ActionResult(error=collective.no_thread(error, description))

    def _join(self) -> None:
        """Wait a moment for this rank's thread."""
        if self._thread is not None:
            self._thread.join(_POLL_S)
