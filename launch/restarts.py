"""Later starts of a job: what was asked of the first must not make them begin anew. No torch import."""

from __future__ import annotations

import json
import os
from pathlib import Path

from moe_train.checkpoint import directory
from moe_train.config.schema import Config
from parallel.errors import LaunchError

FIRST = "MOE_FIRST_START"
"""Set by `train.sbatch`: the file that remembers the first start of a job, for requeues and the jobs of a chain."""


def overrides() -> list[str]:
    """What this start of a batch job adds to its command line: `resume=auto` once an earlier one has saved anything.

    Before the config is composed, since a checkpoint that `resume` names may be gone by now, and would be refused.
    """
    file = Path(os.environ.get(FIRST, ""))
    if not file.is_file():
        return []
    try:
        first = json.loads(file.read_text(encoding="utf-8"))
        saved = has_new(first["checkpoints"], Path(first["dir"]))
    except (ValueError, KeyError, TypeError, AttributeError):
        saved = True  # damaged: there was an earlier start, and to begin anew would write over what it saved
    return ["resume=auto"] if saved else []


def remember(cfg: Config) -> None:
    """Note which checkpoints are there, where this is the first start of a batch job.

    Raises:
        LaunchError: run_dir cannot be written.
    """
    if FIRST not in os.environ or (file := Path(os.environ[FIRST])).exists():
        return
    root = cfg.checkpoint_root.resolve()
    try:
        directory.replace_file(file, json.dumps({"dir": str(root), "checkpoints": checkpoints(root)}) + "\n")
    except OSError as error:
        raise LaunchError(f"run_dir={cfg.run_dir} cannot be written: {error.strerror}", "set run_dir=PATH") from error


def checkpoints(root: Path) -> dict[str, int]:
    """When each checkpoint there was written."""
    files = (path / directory.STATE for path in directory.candidates(root))
    return {file.parent.name: file.stat().st_mtime_ns for file in files if file.exists()}


def has_new(before: dict[str, int], root: Path) -> bool:
    """Whether a checkpoint there was written since `before`. Those that someone removed since do not count."""
    return not checkpoints(root).items() <= before.items()
