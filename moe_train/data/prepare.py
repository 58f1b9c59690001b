"""Text -> tokenizer -> Megatron indexed dataset, in parallel, resumable, and the same bytes for any number of workers.

`data.dir` ends up with tokenizer.json, text_document.bin, text_document.idx and, written last, manifest.json: a
directory without a manifest is not a dataset. With `data.sources`, each source has its pair of files in a directory of
its name. What is finished before an interruption is kept in `parts/` and used again (`moe_train/data/pipeline.py`).
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from moe_train.config import former
from moe_train.config.model import ModelConfig
from moe_train.config.schema import DataConfig
from moe_train.data import corpus, filters, lock, minhash
from moe_train.data.files import Source, fingerprint, sources_of
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
from moe_train.data.pipeline import Pipeline
from moe_train.data.report import Reason, Report, lines
from moe_train.data.team import ALONE, FOLDER, RankGroup, Team, TeamFinished
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
    "source", "path", "sources", "text_key", "encoding", "follow_links", "deduplicate", "min_characters",
    "max_characters", "languages", "filter", "near_duplicates", "null_text", "bad_records", "tokenizer",
    "tokenizer_vocab_size", "append_eod", "eod_token", "prepend_bos", "bos_token", "parse_special_tokens",
)  # fmt: skip
# What a manifest means that lacks a setting, being older than it.
_DEFAULTS: dict[str, Any] = vars(DataConfig()) | {
    name.removeprefix("data."): value for name, value in former.DEFAULTS.items() if name.startswith("data.")
}
_RECORD, _TOKENIZER_DONE = "settings.json", "tokenizer.done"
_FORMAT = 2  # of the documents that are made from one corpus; raise it when this code makes others


def prepare(
    data: DataConfig, model_vocab_size: int, progress: bool, verify: bool = False, ranks: RankGroup = ALONE
) -> bool:
    """Make the dataset of `data` unless it is there already.

    Args:
        model_vocab_size: tokens of the model; the tokenizer may not have more.
        progress: show how far it is on standard error.
        verify: also compare the checksums of a dataset that is there already.
        ranks: which of several processes this is that make it together. All of them call this.

    Returns:
        whether it was made now; the manifest then says what was left out of the text.

    Raises:
        DataError: the text, the tokenizer or the dataset is missing, damaged or does not fit; nothing is overwritten.
    """
    directory = Path(data.dir)
    report = Report()
    sources = sources_of(data, report)
    settings = _settings(data, sources)
    try:
        if not (directory / MANIFEST).exists():
            directory.mkdir(parents=True, exist_ok=True)
            making = _Making(data, directory, sources, settings, model_vocab_size, progress, report)
            with Team(ranks, directory, _workers(data, ranks), directory / MANIFEST) as team:
                if ranks.rank:
                    making.help(team)
                    return True
                with lock.only_one(directory, _print_notice):
                    if not (directory / MANIFEST).exists():  # another process may have made it in the meantime
                        making.make(team)
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


def _workers(data: DataConfig, ranks: RankGroup) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return data.prepare_workers or max(1, cores // ranks.local_size)


def summary(manifest: dict[str, Any]) -> list[str]:
    """Lines about what was read for a dataset, left out and changed; none for datasets of older versions."""
    return lines(manifest["corpus"]) if "corpus" in manifest else []


def left_out(data: DataConfig) -> list[str]:
    """The lines of `summary` for the dataset at `data.dir`, where anything was left out or changed."""
    manifest = read_manifest(data)
    return summary(manifest) if manifest.get("corpus", {}).get("left_out_or_changed") else []


def _print_notice(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _settings(data: DataConfig, sources: Sequence[Source]) -> dict[str, Any]:
    """All that decides what the dataset holds."""
    values = asdict(data)
    settings = {key: values[key] for key in _SETTINGS}
    if data.filter is not None:
        source_file = filters.source_of(data.filter)
        settings["filter file"] = None if source_file is None else sha256_of(source_file)
    if data.tokenizer:
        source = find_tokenizer(data.tokenizer)
        settings["tokenizer files"] = [sha256_of(file) for file in (source, *companions(source))]
        del settings["tokenizer_vocab_size"]  # of one that is trained
    prints = [fingerprint(source.data, source.files) for source in sources]
    return settings | {"corpus": prints if data.sources else prints[0], "format": _FORMAT}


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


@dataclass
class _Making:
    """A dataset that is made now."""

    data: DataConfig
    directory: Path
    sources: list[Source]
    settings: dict[str, Any]
    model_vocab_size: int
    progress: bool
    report: Report

    @property
    def parts(self) -> Path:
        return self.directory / "parts"

    @property
    def tokenizer(self) -> Path:
        return self.directory / TOKENIZER

    def help(self, team: Team) -> None:
        """What ranks other than 0 do: their tasks of each stage."""
        text = json.dumps(self.settings)
        try:
            team.wait(lambda: _text_of(self.parts / _RECORD) == text and (self.parts / _TOKENIZER_DONE).exists())
            self._pipeline(team, self._load(), show=False).run(Report())
            team.wait(lambda: False)
        except TeamFinished:
            return
        except OSError:
            if not (self.directory / MANIFEST).exists():  # else rank 0 was done, and removed what we wanted to read
                raise

    def make(self, team: Team) -> None:
        """What rank 0 does: the tokenizer, its tasks of each stage, and the files of the dataset."""
        built = [self.directory / f"{PREFIX}.{suffix}" for suffix in ("bin", "idx")]
        if not self.parts.exists() and any(path.exists() for path in built):
            raise DataError(
                f"data.dir={self.directory} has a dataset that another program made", "set data.dir=NEW_DIRECTORY"
            )
        _start_parts(self.parts, self.settings)
        shutil.rmtree(self.directory / "cache", ignore_errors=True)  # indices of a dataset that was here before
        if self.data.near_duplicates is not None:
            minhash.available(f"data.near_duplicates={self.data.near_duplicates}")
        filters.DocumentFilter(self.data)
        if not (self.parts / _TOKENIZER_DONE).exists():
            _provide_tokenizer(self.data, self.sources, self.tokenizer)
            (self.parts / _TOKENIZER_DONE).touch()
        loaded = self._load()
        pipeline = self._pipeline(team, loaded, self.progress)
        orders = pipeline.run(self.report)
        written = pipeline.write(orders, self.directory)
        documents = sum(pair.documents for pair in written)
        self.report.add(Reason.NO_TOKENS, self.directory, self.report.kept - documents)
        self.report.kept = documents
        known = {f"{pair.prefix}.bin": pair.sha256 for pair in written}
        names = [*(f.name for f in (self.tokenizer, *companions(self.tokenizer))),
                 *(f"{pair.prefix}.{suffix}" for pair in written for suffix in ("bin", "idx"))]  # fmt: skip
        manifest = {
            "settings": self.settings,
            "corpus": self.report.to_dict(),
            "documents": documents,
            "tokens": sum(pair.tokens for pair in written),
            "vocab_size": loaded.vocab_size,
            "special_tokens": {"eod": loaded.eod_token, "bos": loaded.bos_token},
            "datasets": [pair.prefix for pair in written],
            "files": {name: _file_record(self.directory / name, known.get(name)) for name in names},
            "lineage": pipeline.lineage(),
        }
        atomic.write_text(self.directory / MANIFEST, json.dumps(manifest, indent=1))
        shutil.rmtree(self.parts)
        shutil.rmtree(self.directory / FOLDER, ignore_errors=True)

    def _load(self) -> Tokenizer:
        loaded = Tokenizer(self.tokenizer, self.data.eod_token, self.data.bos_token)
        if self.data.prepend_bos and loaded.bos is None:
            raise DataError(
                "data.prepend_bos=true, but the tokenizer's files define no beginning-of-sequence token",
                "set data.bos_token=TOKEN or data.prepend_bos=false",
            )
        check_vocabulary(loaded.vocab_size, self.model_vocab_size)
        return loaded

    def _pipeline(self, team: Team, loaded: Tokenizer, show: bool) -> Pipeline:
        dtype = np.dtype(np.uint16 if loaded.vocab_size <= 65_536 else np.int32)
        return Pipeline(self.data, self.sources, team, self.parts, self.tokenizer, dtype, show)


def _file_record(file: Path, sha256: str | None) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": sha256 or sha256_of(file), "identity": identity(file)}


def _text_of(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return None


def _start_parts(pieces: Path, settings: dict[str, Any]) -> None:
    """Keep the parts of an interrupted run only if they were made with the same settings."""
    record, text = pieces / _RECORD, json.dumps(settings)
    if _text_of(record) != text:
        pieces.mkdir(exist_ok=True)
        record.unlink(missing_ok=True)  # first: other ranks begin when it is as they want it
        for old in pieces.iterdir():  # the folder stays: it tells that this dataset is unfinished and ours
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        atomic.write_text(record, text)


def _provide_tokenizer(data: DataConfig, sources: Sequence[Source], path: Path) -> None:
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
            train_tokenizer(_sample(sources), data.tokenizer_vocab_size, temporary)


def _sample(sources: Sequence[Source]) -> Iterator[str]:
    """Text for training a tokenizer: documents of files spread over the corpus, up to a few megabytes."""
    files = [(source, file) for source in sources for file in source.files]
    total = sum(file.stat().st_size for _, file in files)
    stride = max(1, total // _TOKENIZER_SAMPLE_CHARACTERS) if len(files) > 100 else 1
    chosen = files[::stride]
    left = _TOKENIZER_SAMPLE_CHARACTERS // len(sources)
    for source in sources:
        own = left
        for text in corpus.documents(source.data, [file for of, file in chosen if of is source]):
            yield text
            own -= len(text)
            if own <= 0:
                break
