"""Which checkpoints of a run may go, and how they go. No torch import."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from moe_train.files import atomic
from moe_train.formats import run_directory


def apply(root: Path, keep_last: int | None, keep_every: int | None) -> list[Path]:
    """Remove the checkpoints under `root` that are neither among the `keep_last` newest nor of a multiple of
    `keep_every` steps. Returns those that went.

    Called when a new one is complete. The one that `latest` names and those of later steps stay (the run was set back
    to an earlier one), and so does every directory that is not a checkpoint of a run.
    """
    if keep_last is None:
        return []
    present = [path for path in run_directory.candidates(root) if _is_ours(path)]
    older = sorted((path for path in present if _step(path) < _step(present[0])), key=_step, reverse=True)
    going = [path for path in older[keep_last - 1 :] if not (keep_every and _step(path) % keep_every == 0)]
    for path in going:
        remove(path)
    return going


def remove(path: Path) -> None:
    """Remove a checkpoint. Killed at any moment, this leaves it whole or under a hidden name."""
    hidden = run_directory.removed_name(path.parent, path.name)
    os.rename(path, hidden)
    atomic.sync(path.parent)
    shutil.rmtree(hidden)


def _step(path: Path) -> int:
    return run_directory.step_of(path.name)


def _is_ours(path: Path) -> bool:
    """Whether it is what `run_directory.publish` gives a name to, and no link or directory that someone put there."""
    return not path.is_symlink() and all(
        (path / name).is_file() for name in (run_directory.STATE, run_directory.METADATA)
    )
