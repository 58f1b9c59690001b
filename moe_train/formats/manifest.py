"""What each file of a checkpoint must be: `manifest.json`, in the format of moe-convert's. No torch import.

    {"format": 1, "files": {NAME: {"bytes": ..., "sha256": ...}}, "sha256": of the part before}

The last entry tells damage to the manifest itself; moe-convert writes none.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from pathlib import Path

from moe_train.files import atomic, untrusted
from moe_train.formats.run_directory import MANIFEST, damaged

_BLOCK_BYTES = 1 << 22


@dataclass(frozen=True)
class Entry:
    """A file: its size and the SHA-256 of its bytes."""

    bytes: int
    sha256: str


Files = dict[str, Entry]


def write(directory: Path, files: Files) -> None:
    """Write the manifest of `files` and wait until it is on disk."""
    atomic.write_text(directory / MANIFEST, _texts(files)[0], durable=True)


def _texts(files: Files) -> tuple[str, str]:
    """The manifest of `files`, and the same as moe-convert writes it."""
    content = {"format": 1, "files": {name: asdict(files[name]) for name in sorted(files)}}
    bare = json.dumps(content, indent=1)
    return json.dumps({**content, "sha256": hashlib.sha256(bare.encode()).hexdigest()}, indent=1), bare


def read(directory: Path) -> Files | None:
    """The manifest of a checkpoint; None where it has none.

    Raises:
        CheckpointError: it is not what was written.
    """
    try:
        data = untrusted.read_bytes(directory / MANIFEST, untrusted.LARGEST_JSON_BYTES)
        text, entries = data.decode(), untrusted.parse_json(data)["files"]
        files = {str(name): Entry(int(entry["bytes"]), str(entry["sha256"])) for name, entry in entries.items()}
        if any(Path(name).is_absolute() or ".." in Path(name).parts for name in files):
            raise ValueError("it names files elsewhere")
        if text not in _texts(files):  # any other byte is damage
            raise ValueError("its content differs from what was written")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(directory, f"{MANIFEST} cannot be read: {error}") from error
    return files


def check(directory: Path, files: Files, rank: int, size: int) -> None:
    """Compare the share of `rank` of `size` in the `files` of a checkpoint with what is there.

    Raises:
        CheckpointError: a file is missing, has another size or other bytes; it is named.
    """
    for name in list(files)[rank::size]:
        if problem := difference(directory / name, files[name]):
            raise damaged(directory, f"{name} {problem}")


def check_some(directory: Path, names: Collection[str]) -> None:
    """Compare these files of a checkpoint with its manifest, where it has one.

    Raises:
        CheckpointError: one has another size or other bytes, or the manifest is damaged.
    """
    files = read(directory) or {}
    check(directory, {name: files[name] for name in names if name in files}, 0, 1)


def difference(path: Path, entry: Entry) -> str:
    """How a file differs from its entry, or "" if it does not."""
    try:
        size = path.stat().st_size
        if size != entry.bytes:
            return f"has {size:,} bytes of {entry.bytes:,}"
        if entry_of(path) != entry:
            return "has other bytes than were written (SHA-256)"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    return ""


def entry_of(path: Path, also: Callable[[memoryview], object] = lambda _: None) -> Entry:
    """Size and digest of a file. `also` gets its blocks."""
    digest, position, block = hashlib.sha256(), 0, memoryview(bytearray(_BLOCK_BYTES))
    with os.fdopen(untrusted.open_regular(path), "rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
            also(block[:count])
            position += count
    return Entry(position, digest.hexdigest())


def describe(directory: Path, known: Files) -> Files:
    """Every file that is in `directory`, and those that are `known` already."""
    names = {entry.name for entry in os.scandir(directory) if entry.is_file()}
    return known | {name: entry_of(directory / name) for name in names - known.keys() - {MANIFEST}}
