"""Later starts of a job: options of the first start must not make them start from scratch. No torch import."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from moe_train.config.schema import Config
from moe_train.files import atomic, untrusted
from moe_train.formats import run_directory
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
        saved = saved_since(untrusted.read_object(file))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        saved = True  # damaged: there was an earlier start, and to start from scratch would write over what it saved
    return ["resume=auto"] if saved else []


def remember(cfg: Config) -> None:
    """Note which checkpoints are there, where this is the first start of a batch job.

    Raises:
        LaunchError: run_dir cannot be written.
    """
    if FIRST not in os.environ or (file := Path(os.environ[FIRST])).exists():
        return
    try:
        atomic.write_text(file, json.dumps(existing_checkpoints(cfg)) + "\n", durable=True)
    except OSError as error:
        raise LaunchError(f"run_dir={cfg.run_dir} cannot be written: {error.strerror}", "set run_dir=PATH") from error


def existing_checkpoints(cfg: Config) -> dict[str, Any]:
    """The checkpoints that are there, for `saved_since`.

    One that is complete on the nodes' disks alone counts where the run started from scratch and there was none before:
    if another node has lost its part by then, the newest that is whole would be that of another run.
    """
    root = cfg.checkpoint_root.resolve()
    first: dict[str, Any] = {"dir": str(root), "checkpoints": _written(root)}
    near = run_directory.node_local_dir(cfg, root)
    if near is not None and cfg.resume == "never" and not first["checkpoints"] and not run_directory.candidates(near):
        first["near"] = str(near)
    return first


def saved_since(first: dict[str, Any]) -> bool:
    """Whether a checkpoint was written since `first` was found. Those that someone removed since do not count."""
    if not _written(Path(first["dir"])).items() <= first["checkpoints"].items():
        return True
    near = run_directory.candidates(Path(first["near"])) if "near" in first else []
    return any((path / run_directory.MANIFEST).exists() for path in near)  # which is the last of its files


def _written(root: Path) -> dict[str, int]:
    """When each checkpoint there was written."""
    files = (path / run_directory.STATE for path in run_directory.candidates(root))
    return {file.parent.name: file.stat().st_mtime_ns for file in files if file.exists()}
