"""manifest.json of a dataset: how it was made, what it holds, and whether its files have changed. No torch import."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moe_train.config.schema import DataConfig
from moe_train.data.index_file import read_index
from moe_train.files import atomic, untrusted
from parallel.errors import DataError

PREFIX = "text_document"
MANIFEST = "manifest.json"
MOST_VERIFIED_BYTES = 2**35  # that data.verify=auto reads before a run starts: about a minute of one core
_VERIFIED = "verified.json"  # in the cache of a dataset
_CHUNK_BYTES = 2**24


def read_manifest(data: DataConfig, verify: bool = False) -> dict[str, Any]:
    """The manifest of the complete dataset at `data.dir`.

    It has settings, documents, tokens, vocab_size, and bytes and sha256 of the files.

    Args:
        verify: compare the checksums too, which reads every byte.

    Raises:
        DataError: there is none, or a file has changed since.
    """
    directory = Path(data.dir)
    if not (directory / MANIFEST).exists():
        raise DataError(
            f"data.dir={directory} has no dataset ({MANIFEST})", "make it with moe-data, or correct data.dir"
        )
    manifest = _read(directory)
    if verify:
        _compare(directory, _files(manifest))
    return manifest


def _read(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST
    try:
        manifest = untrusted.read_object(path)
        recorded = _files(manifest)
        dict(manifest["settings"]), int(manifest["vocab_size"]), int(manifest["documents"]), int(manifest["tokens"])
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}", "make it readable, or set data.dir") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is damaged", _again(directory)) from error
    for name, (size, _) in recorded.items():
        file = directory / name
        if not file.is_file():
            raise DataError(f"{file} is missing", _again(directory))
        if file.stat().st_size != size:
            raise _damaged(file)
    return manifest


def _files(manifest: dict[str, Any]) -> dict[str, tuple[int, str]]:
    return {str(name): (int(file["bytes"]), str(file["sha256"])) for name, file in manifest["files"].items()}


def _again(directory: Path) -> str:
    return f"delete {directory} and run moe-data"


def _damaged(file: Path) -> DataError:
    return DataError(f"{file} is damaged: it is not the file that {MANIFEST} describes", _again(file.parent))


def prefixes(data: DataConfig) -> list[str]:
    """The .bin/.idx pairs that `data` trains on, without their suffixes: one at `data.dir`, or those of `data.blend`.

    Raises:
        DataError: `data.dir` has no complete dataset.
    """
    if data.blend:
        return [entry.path for entry in data.blend]
    return [str(Path(data.dir) / prefix) for prefix in read_manifest(data).get("datasets", [PREFIX])]


def manifest_of(prefix: str) -> dict[str, Any] | None:
    """The manifest of the pair of files at `prefix`; None where another program made them.

    Raises:
        DataError: it is damaged, or a file that it names is missing or of another size.
    """
    directory = directory_of(prefix)
    return None if directory is None else _read(directory)


def directory_of(prefix: str) -> Path | None:
    """The directory of the manifest of the pair of files at `prefix`: its own, or that of all its sources."""
    if Path(prefix).name != PREFIX:
        return None
    own = Path(prefix).parent
    if (own / MANIFEST).exists():
        return own
    is_source = (own.parent / MANIFEST).exists() and f"{own.name}/{PREFIX}" in _read(own.parent).get("datasets", [])
    return own.parent if is_source else None


def tokens_of(data: DataConfig) -> int:
    """Tokens in the dataset of `data`, or in all datasets of its blend together.

    Raises:
        DataError: one is missing or damaged.
    """
    return sum(read_index(prefix).tokens for prefix in prefixes(data))


def known_tokens(data: DataConfig) -> int | None:
    """Tokens in the datasets of `data`; None where the dataset is not made yet.

    Raises:
        DataError: one is damaged.
    """
    if not data.blend and not (Path(data.dir) / MANIFEST).exists():
        return None
    return tokens_of(data)


def verify(data: DataConfig, progress: Callable[[int], None] = lambda _: None, again: bool = False) -> list[str]:
    """Compare the files of `data` with the SHA-256 sums in their manifests, as `data.verify` says.

    A file that was compared, or written, before is not read again while its size, time of change and inode stay.
    Datasets of other programs have no manifest.

    Args:
        progress: called with the number of bytes that were read.
        again: compare all files whole, also those that were right before, and for any `data.verify`.

    Returns:
        warnings, one line each.

    Raises:
        DataError: a file has changed.
    """
    warnings = []
    directories = {found for prefix in prefixes(data) if (found := directory_of(prefix)) is not None}
    for directory in sorted(directories):
        manifest = _read(directory)
        files = {name: f for name, f in _files(manifest).items() if again or not _known(directory, manifest, name)}
        size = sum(size for size, _ in files.values())
        if data.verify == "size" and not again:
            continue
        if data.verify == "auto" and not again and size > MOST_VERIFIED_BYTES:
            warnings.append(
                f"{size / 2**30:,.0f} GiB of {directory} are not compared with their checksums before the start: run "
                "moe-data once, or set data.verify=full"
            )
            continue
        _remember(directory, manifest, _compare(directory, files, progress))
    return warnings


def _compare(
    directory: Path, files: dict[str, tuple[int, str]], progress: Callable[[int], None] = lambda _: None
) -> dict[str, list[Any]]:
    """Read `files` whole. Returns, by name, the checksum and the identity of the bytes that were read."""
    verified = {}
    for name, (_, sha256) in files.items():
        before = identity(directory / name)
        if sha256_of(directory / name, progress) != sha256:
            raise _damaged(directory / name)
        verified[name] = [sha256, *before]
    return verified


def _remember(directory: Path, manifest: dict[str, Any], right: dict[str, list[Any]]) -> None:
    """Keep which bytes were right. What the manifest itself knows needs no other record."""
    new = {name: known for name, known in right.items() if not _known(directory, manifest, name)}
    if not new:
        return
    cache = directory / "cache"
    with contextlib.suppress(OSError):  # a directory that is read only: it is compared at the next start again
        cache.mkdir(exist_ok=True)
        atomic.write_text(cache / _VERIFIED, json.dumps(_verified(directory) | new))


def _known(directory: Path, manifest: dict[str, Any], name: str) -> bool:
    """Whether the file was right before, and has not been written since."""
    sha256 = manifest["files"][name]["sha256"]
    now = [sha256, *identity(directory / name)]
    return now in (_verified(directory).get(name), [sha256, *manifest["files"][name].get("identity", [])])


def _verified(directory: Path) -> dict[str, list[Any]]:
    try:
        return untrusted.read_object(directory / "cache" / _VERIFIED)
    except (OSError, ValueError):
        return {}


def identity(file: Path) -> list[int]:
    """Size in bytes, time of the last change in ns, and inode: what changes when a file is written or copied."""
    status = file.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ino]


def sha256_of(file: Path, progress: Callable[[int], None] = lambda _: None) -> str:
    """SHA-256 of a file's bytes. `progress` is called with the number of bytes that were read."""
    digest = hashlib.sha256()
    with open(file, "rb", buffering=0) as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
            progress(len(chunk))
    return digest.hexdigest()
