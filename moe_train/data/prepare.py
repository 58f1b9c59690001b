"""Text -> tokenizer -> Megatron indexed dataset, in parallel, resumable, and the same bytes for any number of workers.

`data.dir` ends up with tokenizer.json, text_document.bin, text_document.idx and, written last, manifest.json: a
directory without a manifest is not a dataset. Parts finished before an interruption are kept in `parts/` and used
again.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from moe_train.config import former
from moe_train.config.model import ModelConfig
from moe_train.config.schema import DataConfig
from moe_train.data import corpus, lock, parts
from moe_train.data.files import fingerprint, source_files
from moe_train.data.index_file import read_index
from moe_train.data.manifest import (
    MANIFEST,
    PREFIX,
    identity,
    manifest_of,
    prefixes,
    read_manifest,
    sha256_of,
    verify,
)
from moe_train.data.report import Reason, Report, lines
from moe_train.data.tokenizer import (
    COMPANIONS,
    TOKENIZER,
    Tokenizer,
    companions,
    find_tokenizer,
    load_tokenizer,
    train_tokenizer,
)  # fmt: skip
from moe_train.files import atomic
from parallel.errors import DataError
from parallel.suggest import override_value

_MOST_VOCABULARY = 1.2  # of the model, over that of the tokenizer, before a warning
_TOKENIZER_SAMPLE_CHARACTERS = 8_000_000
_SETTINGS = (
    "source", "path", "text_key", "encoding", "follow_links", "deduplicate", "min_characters", "null_text",
    "bad_records", "tokenizer", "tokenizer_vocab_size", "append_eod", "eod_token", "prepend_bos",
    "bos_token", "parse_special_tokens",
)  # fmt: skip
# What a manifest means that lacks a setting, being older than it.
_DEFAULTS: dict[str, Any] = vars(DataConfig()) | {
    name.removeprefix("data."): value for name, value in former.DEFAULTS.items() if name.startswith("data.")
}
_FORMAT = 2  # of the documents that are made from one corpus; raise it when this code makes others


def prepare(data: DataConfig, model_vocab_size: int, progress: bool, verify: bool = False) -> bool:
    """Make the dataset of `data` unless it is there already.

    Args:
        model_vocab_size: tokens of the model; the tokenizer may not have more.
        progress: show a bar where standard error is a terminal.
        verify: also compare the checksums of a dataset that is there already.

    Returns:
        whether it was made now; the manifest then says what was left out of the text.

    Raises:
        DataError: the text, the tokenizer or the dataset is missing, damaged or does not fit; nothing is overwritten.
    """
    directory = Path(data.dir)
    report = Report()
    files = source_files(data, report)
    settings = _settings(data, files)
    try:
        if not (directory / MANIFEST).exists():
            directory.mkdir(parents=True, exist_ok=True)
            with lock.only_one(directory, _print_notice):
                if not (directory / MANIFEST).exists():  # another process may have made it in the meantime
                    _make(data, directory, files, settings, model_vocab_size, progress, report)
                    return True
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(f"data.dir={directory} cannot be written: {reason}", "free space or set data.dir") from error
    manifest = read_manifest(data, verify)
    changed = _changed(manifest["settings"], settings)
    if changed:
        names = ", ".join(f"data.{key}" if key in _SETTINGS else key for key in changed)
        remedy = f"set data.dir=NEW_DIRECTORY, or delete {directory}"
        if set(changed) <= set(_SETTINGS):
            saved = _DEFAULTS | manifest["settings"]
            remedy += f", or set {' '.join(f'data.{key}={override_value(saved[key])}' for key in changed)} again"
        raise DataError(f"data.dir={directory} was made with other settings ({names})", remedy)
    check_vocabulary(manifest["vocab_size"], model_vocab_size)
    return False


def summary(manifest: dict[str, Any]) -> list[str]:
    """Lines about what was read for a dataset, left out and changed; none for datasets of older versions."""
    return lines(manifest["corpus"]) if "corpus" in manifest else []


def left_out(data: DataConfig) -> list[str]:
    """The lines of `summary` for the dataset at `data.dir`, where anything was left out or changed."""
    manifest = read_manifest(data)
    return summary(manifest) if manifest.get("corpus", {}).get("left_out_or_changed") else []


def _print_notice(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _settings(data: DataConfig, files: list[Path]) -> dict[str, Any]:
    """All that decides what the dataset holds."""
    values = asdict(data)
    settings = {key: values[key] for key in _SETTINGS}
    if data.tokenizer:
        source = find_tokenizer(data.tokenizer)
        settings["tokenizer files"] = [sha256_of(file) for file in (source, *companions(source))]
        del settings["tokenizer_vocab_size"]  # of one that is trained
    return settings | {"corpus": fingerprint(data, files), "format": _FORMAT}


def _changed(saved: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    """Settings that differ from those a dataset was made with. Older manifests lack fields that are newer than they."""
    return sorted(key for key, value in settings.items() if saved.get(key, _DEFAULTS.get(key)) != value)


def check_vocabulary(tokens: int, model_vocab_size: int) -> None:
    """Raise DataError if the tokenizer has tokens that the model has no embedding for."""
    if tokens > model_vocab_size:
        raise DataError(
            f"the tokenizer has {tokens} tokens, model.vocab_size only {model_vocab_size}",
            f"set model.vocab_size={tokens}",
        )


def known_vocabulary(data: DataConfig) -> int | None:
    """Tokens of the tokenizer that `data` trains with, as far as that is known before the dataset is made.

    Raises:
        DataError: its files are damaged, or the tokenizer that data.tokenizer names does not exist.
    """
    own = Path(data.dir) / TOKENIZER
    if (Path(data.dir) / MANIFEST).exists() or (data.source == "none" and own.is_file()):
        return load_tokenizer(data).vocab_size if own.is_file() else None
    if data.source == "none":
        return None
    if data.tokenizer:
        return Tokenizer(find_tokenizer(data.tokenizer), data.eod_token, data.bos_token).vocab_size
    return data.tokenizer_vocab_size


def unused_vocabulary(tokens: int, model: ModelConfig) -> str | None:
    """A warning where the model has many more embeddings than the tokenizer has tokens; None where it has not."""
    needed = -(-tokens // 128) * 128
    if model.vocab_size <= _MOST_VOCABULARY * needed:
        return None
    matrices = 1 if model.tie_embeddings else 2
    unused = (model.padded_vocab_size - needed) * model.hidden_size * matrices
    return (
        f"model.vocab_size={model.vocab_size} is far above the {tokens} tokens of the tokenizer: {unused:,} parameters "
        f"of the embedding are never used (model.vocab_size={tokens} has none)"
    )


def check_prepared(data: DataConfig, model_vocab_size: int) -> None:
    """Check the datasets of `data.source=none`. It reads no text and starts no process.

    Raises:
        DataError: one is missing, not whole, or made with another tokenizer than that in `data.dir`.
    """
    tokenizer = load_tokenizer(data)
    check_vocabulary(tokenizer.vocab_size, model_vocab_size)
    for prefix in prefixes(data):
        read_index(prefix)
        manifest_of(prefix)
        own = Path(prefix).with_name(TOKENIZER)
        if data.blend and own.is_file() and not _same_vocabulary(tokenizer, own):
            raise DataError(
                f"{prefix} of data.blend was made with {own}, whose vocabulary is not that of {tokenizer.path}",
                f"make it again with data.tokenizer={data.dir}, or set data.dir to the directory of its tokenizer",
            )


def _same_vocabulary(tokenizer: Tokenizer, other: Path) -> bool:
    if other.read_bytes() == tokenizer.path.read_bytes():
        return True
    return Tokenizer(other, tokenizer.eod_token).same_vocabulary(tokenizer)


def examine(data: DataConfig, model: ModelConfig, progress: bool) -> list[str]:
    """Compare datasets that are there with their checksums, as `data.verify` says, and with the model.

    Args:
        progress: show a bar where standard error is a terminal.

    Returns:
        warnings, one line each.

    Raises:
        DataError: a file is damaged.
    """
    warnings = _verify(data, progress)
    unused = unused_vocabulary(load_tokenizer(data).vocab_size, model)
    return [*warnings, unused] if unused else warnings


def compare(data: DataConfig, progress: bool) -> None:
    """Compare every byte of the datasets with their checksums, also where that was done before.

    Raises:
        DataError: a file is damaged.
    """
    _verify(data, progress, again=True)


def _verify(data: DataConfig, progress: bool, again: bool = False) -> list[str]:
    with _bar(progress) as bar:
        task = bar.add_task("comparing checksums", total=None)
        return verify(data, lambda count: bar.advance(task, count), again)


def _bar(progress: bool) -> Progress:
    console = Console(stderr=True)
    return Progress(console=console, transient=True, disable=not (progress and console.is_terminal))


def _make(
    data: DataConfig,
    directory: Path,
    files: list[Path],
    settings: dict[str, Any],
    model_vocab_size: int,
    progress: bool,
    report: Report,
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
    loaded = Tokenizer(tokenizer, data.eod_token, data.bos_token)
    if data.prepend_bos and loaded.bos is None:
        raise DataError(
            "data.prepend_bos=true, but the tokenizer's files define no beginning-of-sequence token",
            "set data.bos_token=TOKEN or data.prepend_bos=false",
        )
    vocab_size = loaded.vocab_size
    check_vocabulary(vocab_size, model_vocab_size)
    dtype = np.dtype(np.uint16 if vocab_size <= 65_536 else np.int32)
    with _bar(progress) as bar:
        count = parts.tokenize(data, files, tokenizer, pieces, dtype, bar, report)
        if count == 0:
            read = "; ".join(lines(report.to_dict()))
            raise DataError(f"the corpus has no text: {read}", "add text or correct data.path")
        for path in built.values():
            atomic.remove_leftovers(path)  # as large as the dataset
            path.with_name(f"{path.name}.part").unlink(missing_ok=True)  # of an earlier version
        with atomic.replacement(built["bin"]) as bin_path, atomic.replacement(built["idx"]) as idx_path:
            documents, tokens = parts.merge(pieces, count, bin_path, idx_path, dtype, bar)
    report.add(Reason.NO_TOKENS, directory, report.kept - documents)
    report.kept = documents
    output_files = [tokenizer, *companions(tokenizer), *built.values()]
    manifest = {
        "settings": settings,
        "corpus": report.to_dict(),
        "documents": documents,
        "tokens": tokens,
        "vocab_size": vocab_size,
        "special_tokens": {"eod": loaded.eod_token, "bos": loaded.bos_token},
        "files": {
            f.name: {"bytes": f.stat().st_size, "sha256": sha256_of(f), "identity": identity(f)} for f in output_files
        },
    }
    atomic.write_text(directory / MANIFEST, json.dumps(manifest, indent=1))
    shutil.rmtree(pieces)


def _start_parts(pieces: Path, settings: dict[str, Any]) -> None:
    """Keep the parts of an interrupted run only if they were made with the same settings."""
    record, text = pieces / "settings.json", json.dumps(settings)
    if not record.exists() or record.read_text(encoding="utf-8") != text:
        pieces.mkdir(exist_ok=True)
        for old in pieces.iterdir():  # the folder stays: it tells that this dataset is unfinished and ours
            old.unlink()
        atomic.write_text(record, text)


def _provide_tokenizer(data: DataConfig, files: list[Path], path: Path) -> None:
    for name in COMPANIONS:
        path.with_name(name).unlink(missing_ok=True)
    if data.tokenizer:
        source = find_tokenizer(data.tokenizer)
        Tokenizer(source, data.eod_token, data.bos_token)  # complain before copying
        for file in companions(source):
            shutil.copyfile(file, path.with_name(file.name))
        with atomic.replacement(path) as temporary:
            shutil.copyfile(source, temporary)
    else:
        with atomic.replacement(path) as temporary:
            train_tokenizer(_sample(data, files), data.tokenizer_vocab_size, temporary)


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
