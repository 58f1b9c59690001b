"""Text -> tokenizer -> Megatron indexed dataset, in parallel, resumable, and the same bytes for any number of workers.

`data.dir` ends up with tokenizer.json, text_document.bin, text_document.idx and, written last, manifest.json: a
directory without a manifest is not a dataset. Parts finished before an interruption are kept in `parts/` and used
again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from moe_train.config.schema import DataConfig
from moe_train.data import corpus, parts
from moe_train.data.tokenizer import (
    COMPANIONS,
    TOKENIZER,
    Tokenizer,
    companions,
    find_tokenizer,
    load_tokenizer,
    train_tokenizer,
)  # fmt: skip
from parallel.errors import DataError

PREFIX = "text_document"
MANIFEST = "manifest.json"
_TOKENIZER_SAMPLE_CHARACTERS = 8_000_000
_SETTINGS = (
    "source", "path", "text_key", "tokenizer", "tokenizer_vocab_size", "append_eod", "eod_token", "prepend_bos",
    "bos_token", "parse_special_tokens",
)  # fmt: skip
_FORMAT = 2  # of the documents that are made from one corpus; raise it when this code makes others


def prepare(data: DataConfig, model_vocab_size: int, progress: bool, verify: bool = False) -> None:
    """Make the dataset of `data` unless it is there already.

    Args:
        model_vocab_size: rows of the model's embedding; the tokenizer may not have more tokens.
        progress: show a bar where standard error is a terminal.
        verify: also compare the checksums of a dataset that is there already.

    Raises:
        DataError: the text, the tokenizer or the dataset is missing, damaged or does not fit; nothing is overwritten.
    """
    directory = Path(data.dir)
    files = corpus.source_files(data)
    settings = _settings(data, files)
    if (directory / MANIFEST).exists():
        manifest = read_manifest(data, verify)
        changed = _changed(manifest["settings"], settings)
        if changed:
            names = ", ".join(f"data.{key}" if key in _SETTINGS else key for key in changed)
            raise DataError(
                f"data.dir={directory} was made with other settings ({names})",
                f"set data.dir=NEW_DIRECTORY, or delete {directory}",
            )
        check_vocabulary(manifest["vocab_size"], model_vocab_size)
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _only_one(directory):
            if not (directory / MANIFEST).exists():  # another process may have made it just now
                _make(data, directory, files, settings, model_vocab_size, progress)
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(f"data.dir={directory} cannot be written: {reason}", "free space or set data.dir") from error


def _settings(data: DataConfig, files: list[Path]) -> dict[str, Any]:
    """All that decides what the dataset holds."""
    values = asdict(data)
    settings = {key: values[key] for key in _SETTINGS}
    if data.tokenizer:
        source = find_tokenizer(data.tokenizer)
        settings["tokenizer files"] = [_sha256(file) for file in (source, *companions(source))]
        del settings["tokenizer_vocab_size"]  # of one that is trained
    return settings | {"corpus": corpus.fingerprint(data, files), "format": _FORMAT}


def _changed(made: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    """Settings that differ from those a dataset was made with. Older manifests lack fields that are newer than they."""
    defaults = vars(DataConfig())
    return sorted(key for key, value in settings.items() if made.get(key, defaults.get(key)) != value)


def read_manifest(data: DataConfig, verify: bool = False) -> dict[str, Any]:
    """The manifest of a complete dataset: settings, documents, tokens, vocab_size, and bytes and sha256 of its files.

    Args:
        verify: compare the checksums too, which reads every byte.

    Raises:
        DataError: there is none, or a file has changed since.
    """
    directory = Path(data.dir)
    path = directory / MANIFEST
    remedy = f"delete {directory} and run moe-data"
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        recorded = {str(name): (int(f["bytes"]), str(f["sha256"])) for name, f in manifest["files"].items()}
        dict(manifest["settings"]), int(manifest["vocab_size"]), int(manifest["documents"]), int(manifest["tokens"])
    except FileNotFoundError:
        raise DataError(f"data.dir={directory} has no dataset ({MANIFEST})", "make it with moe-data") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}", "make it readable, or set data.dir") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is damaged", remedy) from error
    for name, (size, sha256) in recorded.items():
        file = directory / name
        if not file.is_file():
            raise DataError(f"{file} is missing", remedy)
        if file.stat().st_size != size or (verify and _sha256(file) != sha256):
            raise DataError(f"{file} is damaged: it is not the file that {MANIFEST} describes", remedy)
    return manifest


def check_vocabulary(tokens: int, model_vocab_size: int) -> None:
    """Raise DataError if the tokenizer has tokens that the model has no embedding for."""
    if tokens > model_vocab_size:
        raise DataError(
            f"the tokenizer has {tokens} tokens, model.vocab_size only {model_vocab_size}",
            f"set model.vocab_size={tokens}",
        )


def check_prepared(data: DataConfig, model_vocab_size: int) -> None:
    """Raise DataError unless the datasets of `data.source=none` are there. It reads no text and starts no process."""
    check_vocabulary(load_tokenizer(data).vocab_size, model_vocab_size)
    if not data.blend:
        read_manifest(data)
    for entry in data.blend:
        for file in (Path(entry.split(maxsplit=1)[1] + suffix) for suffix in (".bin", ".idx")):
            if not file.is_file():
                raise DataError(f"data.blend names {file}, which is not there", "correct the prefix in data.blend")


@contextlib.contextmanager
def _only_one(directory: Path) -> Iterator[None]:
    """Hold a lock that ends with the process, so that two commands never write one dataset."""
    import fcntl

    with open(directory / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"another process is making data.dir={directory}", "wait for it to end") from None
        yield


def _make(
    data: DataConfig,
    directory: Path,
    files: list[Path],
    settings: dict[str, Any],
    model_vocab_size: int,
    progress: bool,
) -> None:
    pieces = directory / "parts"
    built = {suffix: directory / f"{PREFIX}.{suffix}" for suffix in ("bin", "idx")}
    if not pieces.exists() and any(path.exists() for path in built.values()):
        raise DataError(f"data.dir={directory} has a dataset that another program made", "set data.dir=NEW_DIRECTORY")
    _start_parts(pieces, settings)
    shutil.rmtree(directory / "cache", ignore_errors=True)  # indices of a dataset that was here before
    tokenizer = directory / TOKENIZER
    if not (pieces / "tokenizer.done").exists():
        _provide_tokenizer(data, files, tokenizer)
        (pieces / "tokenizer.done").touch()
    made = Tokenizer(tokenizer, data.eod_token, data.bos_token)
    if data.prepend_bos and made.bos is None:
        raise DataError(
            "data.prepend_bos=true, but the tokenizer's files name no beginning-of-sequence token",
            "set data.bos_token=TOKEN or data.prepend_bos=false",
        )
    vocab_size = made.vocab_size
    check_vocabulary(vocab_size, model_vocab_size)
    dtype = np.dtype(np.uint16 if vocab_size <= 65_536 else np.int32)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not (progress and console.is_terminal)) as bar:
        count = parts.tokenize(data, files, tokenizer, pieces, dtype, bar)
        if count == 0:
            raise DataError("the corpus has no text", "add text or correct data.path")
        part = {suffix: path.with_name(f"{path.name}.part") for suffix, path in built.items()}
        documents, tokens = parts.merge(pieces, count, part["bin"], part["idx"], dtype, bar)
    for suffix, path in built.items():
        os.replace(part[suffix], path)
    found = [tokenizer, *companions(tokenizer), *built.values()]
    manifest = {
        "settings": settings,
        "documents": documents,
        "tokens": tokens,
        "vocab_size": vocab_size,
        "special_tokens": {"eod": made.eod_token, "bos": made.bos_token},
        "files": {f.name: {"bytes": f.stat().st_size, "sha256": _sha256(f)} for f in found},
    }
    _write(directory / MANIFEST, json.dumps(manifest, indent=1).encode())
    shutil.rmtree(pieces)


def _start_parts(pieces: Path, settings: dict[str, Any]) -> None:
    """Keep the parts of an interrupted run only if they were made with the same settings."""
    record, text = pieces / "settings.json", json.dumps(settings)
    if not record.exists() or record.read_text(encoding="utf-8") != text:
        pieces.mkdir(exist_ok=True)
        for old in pieces.iterdir():  # the folder stays: it tells that this dataset is unfinished and ours
            old.unlink()
        _write(record, text.encode())


def _provide_tokenizer(data: DataConfig, files: list[Path], path: Path) -> None:
    part = path.with_suffix(".part")
    for name in COMPANIONS:
        path.with_name(name).unlink(missing_ok=True)
    if data.tokenizer:
        source = find_tokenizer(data.tokenizer)
        Tokenizer(source, data.eod_token, data.bos_token)  # complain before copying
        shutil.copyfile(source, part)
        for file in companions(source):
            shutil.copyfile(file, path.with_name(file.name))
    else:
        train_tokenizer(_sample(data, files), data.tokenizer_vocab_size, part)
    os.replace(part, path)


def _sample(data: DataConfig, files: list[Path]) -> Iterator[str]:
    """Text for training a tokenizer: documents of files spread over the corpus, up to a few megabytes."""
    total = sum(f.stat().st_size for f in files)
    stride = max(1, total // _TOKENIZER_SAMPLE_CHARACTERS) if len(files) > 100 else 1
    left = _TOKENIZER_SAMPLE_CHARACTERS
    for text in corpus.documents(data, files[::stride]):
        yield text
        left -= len(text)
        if left <= 0:
            return


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _write(path: Path, content: bytes) -> None:
    part = path.with_suffix(".part")
    part.write_bytes(content)
    os.replace(part, path)
