"""Checkpoints as directories: their names, which are complete, and how one appears all at once. No torch import.

    checkpoints/
        latest            name of the checkpoint that was completed last
        step_00000010/
            .metadata     which file has which part of which tensor
            *.distcp      tensors
            state.json    progress, schedule, loss scale, layout
            config.yaml   the resolved config of the run
            manifest.json size and SHA-256 of every other file

A checkpoint is written under a hidden name and renamed when everything is on disk, so a name without a dot is complete.
It gets another hidden name before it is removed.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from moe_train.config.schema import Config
from moe_train.files import atomic, untrusted
from parallel.errors import CheckpointError

LATEST = "latest"
STATE = "state.json"
CONFIG = "config.yaml"
METADATA = ".metadata"
MANIFEST = "manifest.json"
BEGAN = "init_from"
"""Folder of run_dir with the small files of the weights that the run began with."""
FORMAT = 2
"""Version of the layout of a checkpoint directory. Raise it when an older reader could not read the new one.

2: norms that Transformer Engine fuses with a projection have its names for them with every backend.
"""
_LARGEST_STATE_BYTES, _LARGEST_NAME_BYTES = 1 << 24, 1 << 12
_NAME = re.compile(r"step_\d{8,}")


class DamagedCheckpoint(CheckpointError):
    """A checkpoint is not what was written. An earlier one may be whole."""


def name_of(step: int) -> str:
    """Directory name of the checkpoint of `step`."""
    return f"step_{step:08d}"


def step_of(name: str) -> int:
    """Step of the checkpoint with the directory name `name`; -1 if that is not the name of a checkpoint."""
    return int(name.removeprefix("step_")) if _NAME.fullmatch(name) else -1


def node_local_dir(cfg: Config, shared: Path) -> Path | None:
    """Node-local directory of the checkpoints that are copied to `shared`; None without checkpoint.local_dir."""
    if cfg.checkpoint.local_dir is None:
        return None
    digest = hashlib.sha256(str(shared.resolve()).encode()).hexdigest()[:8]
    return Path(cfg.checkpoint.local_dir, f"{Path(cfg.run_dir).name}-{digest}")


def prepare(root: Path, name: str) -> Path:
    """An empty hidden directory to write the checkpoint `name` into. Leftovers of what was cut short go."""
    root.mkdir(parents=True, exist_ok=True)
    sweep(root)
    directory = partial_of(root, name)
    directory.mkdir()
    return directory


def try_writing(root: Path, field: str) -> None:
    """Raise CheckpointError where no file can be written to `root`, which `field` sets."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            pass
    except OSError as error:
        remedy = f"check free space and permissions, or set {field}"
        raise CheckpointError(f"cannot write to {root}: {error.strerror or error}", remedy) from error


def sweep(root: Path) -> None:
    """Remove what writing and removing left when they were cut short. Only for the run that owns the directory."""
    atomic.remove_leftovers(root / LATEST)
    for pattern in (".step_*.partial", ".step_*.removed"):
        for leftover in root.glob(pattern):
            if leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()  # a link goes, and what it leads to stays


def publish(root: Path, name: str) -> Path:
    """Give the finished hidden directory its real name and point `latest` to it; both atomic and on disk on return.

    A checkpoint of the same name (from an earlier run with the same run_dir) stays until the new one has its place.
    """
    partial, final, old = partial_of(root, name), root / name, _replaced(root, name)
    for file in partial.iterdir():
        if file.suffix != ".distcp":  # those, the large and many ones, were waited for by the ranks that wrote them
            atomic.sync(file)
    atomic.sync(partial)
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)  # of an earlier time that was cut short after `final` had appeared
        os.rename(final, old)
    os.rename(partial, final)
    atomic.sync(root)
    write_latest(root, name)
    shutil.rmtree(old, ignore_errors=True)
    return final


def write_latest(root: Path, name: str) -> None:
    """Point `latest` to the checkpoint `name`, atomically."""
    atomic.write_text(root / LATEST, name + "\n", durable=True)


def candidates(root: Path) -> list[Path]:
    """Checkpoints under `root`, the one to continue from first: what `latest` names, then others by falling step."""
    if not root.is_dir():
        return []
    checkpoints = [path for path in root.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    checkpoints.sort(key=lambda path: step_of(path.name), reverse=True)
    latest = _read_latest(root)
    return sorted(checkpoints, key=lambda path: path.name != latest)  # stable: the rest keeps its order


def _read_latest(root: Path) -> str:
    """The name in `latest`; "" where there is none that can be read: the newest checkpoint counts then."""
    try:
        return untrusted.read_bytes(root / LATEST, _LARGEST_NAME_BYTES).decode(errors="replace").strip()
    except (OSError, ValueError):
        return ""


def resolve(path: Path, field: str) -> list[Path]:
    """Checkpoints that `field=path` may mean, best first: itself, those in it, or those of that run directory.

    Raises:
        CheckpointError: nothing is there, or it is not a checkpoint.
    """
    if not path.exists():
        raise CheckpointError(f"{field}={path} does not exist", _checkpoints_near(path))
    if (path / STATE).is_file() or (path / METADATA).is_file() or _NAME.fullmatch(path.name):
        return [path]
    checkpoints = candidates(path) or candidates(path / "checkpoints")
    if checkpoints:
        return checkpoints
    if (path / "config.json").is_file():
        raise CheckpointError(
            f"{field}={path} is a Hugging Face model, not a checkpoint of a run",
            f"set {field} to a directory like runs/NAME/checkpoints/{name_of(100)}",
        )
    raise CheckpointError(f"{field}={path} holds no checkpoint", _checkpoints_near(path))


def check_files(directory: Path) -> None:
    """Raise CheckpointError where one of the small files that every checkpoint has is missing."""
    for name in (STATE, CONFIG, METADATA):
        if not (directory / name).is_file():
            raise damaged(directory, f"{name} is missing")


def read_state(directory: Path, oldest: int = FORMAT) -> dict[str, Any]:
    """state.json of a checkpoint.

    Args:
        oldest: earliest format that the caller reads.

    Raises:
        CheckpointError: it cannot be read, or is of a version with another format.
    """
    try:
        state = untrusted.read_json(directory / STATE, _LARGEST_STATE_BYTES)
        if not isinstance(state, dict) or type(state.get("format")) is not int:
            raise ValueError("it has no format")
    except (OSError, ValueError) as error:
        raise damaged(directory, f"{STATE} cannot be read: {error}") from error
    version = state["format"]
    if version > FORMAT:
        raise CheckpointError(
            f"checkpoint {directory} has format {version}, and this version of moe-train reads up to {FORMAT}",
            "update moe-train",
        )
    if version < oldest:
        raise CheckpointError(
            f"checkpoint {directory} has format {version}, and this version of moe-train reads format {FORMAT}",
            "continue it with the version that wrote it, or start another run with resume=never and another run_dir",
        )
    return state


def damaged(directory: Path, defect: str) -> DamagedCheckpoint:
    """The error for a checkpoint that cannot be read, with the other checkpoints next to it as the remedy."""
    others = [p.name for p in candidates(directory.parent) if p.name != directory.name]
    remedy = (
        f"set resume={directory.parent / others[0]}"
        if others
        else "restore the directory from a copy, or set resume=never"
    )
    return DamagedCheckpoint(f"checkpoint {directory} is damaged: {defect}", remedy)


def _checkpoints_near(path: Path) -> str:
    """A remedy that names a checkpoint close to a path that has none."""
    for root in (path.parent, path.parent / "checkpoints"):
        if checkpoints := candidates(root):
            return f"did you mean {checkpoints[0]}"
    return f"name a directory like runs/NAME/checkpoints/{name_of(100)}"


def partial_of(root: Path, name: str) -> Path:
    """Where the checkpoint `name` grows."""
    return root / f".{name}.partial"


def removed_name(root: Path, name: str) -> Path:
    """Path of the checkpoint `name` while it is being removed."""
    return root / f".{name}.removed"


def _replaced(root: Path, name: str) -> Path:
    return root / f".{name}.replaced"


def recover(root: Path) -> None:
    """Bring back a checkpoint that was moved aside for a newer one of its name which then never came.

    Only for the run that owns the directory: another process may look while a checkpoint is being replaced.
    """
    for old in root.glob(".step_*.replaced"):
        final = root / old.name.removeprefix(".").removesuffix(".replaced")
        if final.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(old, final)
