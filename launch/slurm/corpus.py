"""The data of a submission: what is there, how often the run reads it, and whether its tokenizer suits the model. No
torch import.
"""

from __future__ import annotations

import glob
import os
import struct
from dataclasses import dataclass, replace
from pathlib import Path

from moe_train.config.schema import Config, DataConfig
from moe_train.data.files import source_files
from moe_train.files import untrusted
from parallel.errors import ConfigError, DataError

STDLIB_TOKENS = 9_000_000  # of Python 3.11, with the tokenizer of 4096 entries
MOST_EPOCHS = 100  # of a corpus, before it is taken for a mistake
USEFUL_EPOCHS = 4  # after which repeated data add little (arXiv 2305.16264)
_HEADER = struct.Struct("<9sQB")  # of an .idx file: magic, version, code of the token type
_BYTES_OF_CODE = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 8: 2}


class NotThere(ConfigError):
    """Data that may be made before the job starts."""


@dataclass(frozen=True)
class Corpus:
    """Args:
    name: what it is, for the user.
    tokens: in all of its documents; None where it is not tokenised yet.
    most_tokens: that it can have at most, where that is known: text has no more tokens than bytes.
    vocab_size: entries of its tokenizer; None where it is not known.
    """

    name: str
    tokens: int | None
    most_tokens: int | None = None
    vocab_size: int | None = None


def of(cfg: Config) -> Corpus:
    """The corpus of a run.

    Raises:
        NotThere: the dataset, or the text that it is made from, is not there.
        ConfigError, DataError: it cannot be read, or is damaged.
    """
    source = cfg.data
    manifest = Path(source.dir, "manifest.json")
    if source.blend:
        prefixes = [entry.path for entry in source.blend]
        tokens = sum(_tokens_at(prefix) for prefix in prefixes)
        sizes = [_vocabulary(Path(prefix).parent) for prefix in prefixes]
        known = [size for size in [*sizes, _vocabulary(Path(source.dir))] if size is not None]
        return Corpus(f"{len(prefixes)} datasets", tokens, vocab_size=max(known, default=None))
    if source.source == "none":
        missing = f"data.dir={source.dir} holds no dataset: manifest.json"
        _readable(manifest, missing, "make it with moe-data, or correct data.dir")
        return _prepared(manifest)
    if source.source == "files":
        texts = [replace(source, path=entry.path, sources=[]) for entry in source.sources] or [source]
        size = sum(map(_text_bytes, texts))
        if manifest.exists():
            return _prepared(manifest)
        vocabulary = source.tokenizer_vocab_size if source.tokenizer is None else _named_vocabulary(source.tokenizer)
        name = ", ".join(entry.name for entry in source.sources) or str(source.path)
        return Corpus(name, None, size, vocabulary)
    return Corpus("the standard library of Python", STDLIB_TOKENS, vocab_size=source.tokenizer_vocab_size)


def check(cfg: Config, tokens: int) -> tuple[str, list[str]]:
    """What a run of `tokens` reads, in a line, with notes.

    Raises:
        NotThere, ConfigError: as `of`; the corpus is far too small, or its tokenizer has more entries than the model.
    """
    corpus = of(cfg)
    share = _share(cfg.data.split)
    entries, rows = corpus.vocab_size, cfg.model.vocab_size
    if entries is not None and entries > rows:
        raise ConfigError(
            f"model.vocab_size={rows} is below the {entries:,} entries of the tokenizer of {corpus.name}",
            f"use model.vocab_size={entries}, or data that were made with the model's tokenizer",
        )
    notes = []
    tokenizer = "" if entries is None else f", tokenizer of {entries:,} entries for model.vocab_size={rows:,}"
    if entries is not None and entries < rows / 2:
        notes.append(f"{rows - entries:,} of {rows:,} rows of the vocabulary (model.vocab_size) have no token")
    if corpus.tokens is None:
        most = int((corpus.most_tokens or 0) * share)
        _refuse_many(f"{corpus.name} has {corpus.most_tokens:,} bytes, and so at most as many tokens", tokens, most)
        size = (corpus.most_tokens or 0) / 1e9
        return f"{corpus.name}: {size:,.3g} GB of text, tokenised when the job starts{tokenizer}", notes
    read = int(corpus.tokens * share)
    _refuse_many(f"{corpus.name} has {read:,} tokens to train on", tokens, read)
    epochs = tokens / max(1, read)
    if epochs > USEFUL_EPOCHS:
        notes.append(f"{epochs:,.1f} epochs: repeated data add little after {USEFUL_EPOCHS} (arXiv 2305.16264)")
    line = f"{corpus.name}: {read:,} tokens to train on, read {epochs:,.2g} times{tokenizer}"
    return line, notes


def _refuse_many(amount: str, tokens: int, read: int) -> None:
    if tokens > MOST_EPOCHS * read:
        raise ConfigError(
            f"{amount}, and the run of {tokens:,} would read them {tokens // max(1, read):,} times",
            "use data=indexed data.dir=DIRECTORY or data=text data.path=FILES, or a smaller train.tokens",
        )


def _share(split: str) -> float:
    """The part of the documents that is trained on."""
    shares = [float(part) for part in split.split(",")]
    return shares[0] / sum(shares)


def _prepared(manifest: Path) -> Corpus:
    """The dataset that a manifest describes: its files are there, whole (their checksums are not compared)."""
    remedy = "make the dataset again with moe-data"
    _readable(manifest, str(manifest), remedy)
    try:
        read = untrusted.read_object(manifest)
        sizes = {str(name): int(file["bytes"]) for name, file in read["files"].items()}
        tokens, entries = int(read["tokens"]), read.get("vocab_size")
        is_dataset = tokens > 0 and any(name.endswith(".bin") for name in sizes)
        vocabulary = _vocabulary(manifest.parent) if entries is None else int(entries)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{manifest} is damaged: {type(error).__name__} {error}", remedy) from error
    if not is_dataset:
        raise ConfigError(f"{manifest} is damaged: its token count is 0 or missing", remedy)
    for name, size in sizes.items():
        path = manifest.parent / name
        _readable(path, f"{path}, which {manifest.name} names,", remedy, ConfigError)
        if path.stat().st_size != size:
            raise ConfigError(f"{path} has {path.stat().st_size:,} bytes, not {size:,} as when it was made", remedy)
    return Corpus(str(manifest.parent), tokens, vocab_size=vocabulary)


def _tokens_at(prefix: str) -> int:
    """Tokens of a .bin/.idx pair, by their size."""
    for suffix in (".bin", ".idx"):
        _readable(Path(prefix + suffix), f"data.blend: {prefix}{suffix}", "correct the prefix in data.blend")
    with open(f"{prefix}.idx", "rb") as stream:
        header = stream.read(_HEADER.size)
    magic, _, code = _HEADER.unpack(header.ljust(_HEADER.size, b"\0"))
    if magic != b"MMIDIDX\0\0" or code not in _BYTES_OF_CODE:
        raise ConfigError(f"data.blend: {prefix}.idx is not an index of a Megatron dataset", "make or copy it again")
    return Path(f"{prefix}.bin").stat().st_size // _BYTES_OF_CODE[code]


def _vocabulary(place: Path) -> int | None:
    """Entries of the tokenizer.json in the directory `place`; None where there is none.

    Raises:
        DataError: it is damaged.
    """
    from moe_train.data import tokenizer

    file = place / tokenizer.TOKENIZER
    return tokenizer.vocab_size(file) if file.is_file() else None


def _named_vocabulary(name: str) -> int:
    """Entries of the tokenizer that data.tokenizer names.

    Raises:
        NotThere: it does not exist.
        DataError: it is damaged.
    """
    from moe_train.data import tokenizer

    try:
        file = tokenizer.find_tokenizer(name)
    except DataError as error:
        raise NotThere(error.cause, error.remedy) from error
    return tokenizer.vocab_size(file)


def _text_bytes(data: DataConfig) -> int:
    """Bytes of the text that moe-data would read; compressed files count for twenty times their size.

    Raises:
        NotThere: there is no such path.
        DataError: there is no text, or it cannot be read.
    """
    if data.path is None:
        raise ConfigError("data.source=files needs data.path", "use data.path=FILES")
    if glob.has_magic(data.path) and not Path(data.path).exists():
        if not glob.glob(data.path, recursive=True):
            raise NotThere(f"data.path={data.path} matches no file", "correct data.path")
    else:
        _readable(Path(data.path), f"data.path={data.path}", "correct data.path")
    files = source_files(data)
    return sum(file.stat().st_size * (20 if file.suffix in (".gz", ".zst", ".parquet") else 1) for file in files)


def _readable(path: Path, subject: str, remedy: str, missing: type[ConfigError] = NotThere) -> None:
    if not path.exists():
        raise missing(f"{subject} does not exist", remedy)
    if not os.access(path, os.R_OK | (os.X_OK if path.is_dir() else 0)):
        raise ConfigError(f"{subject} cannot be read by this user", remedy)
