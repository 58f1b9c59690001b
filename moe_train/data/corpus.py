"""Text documents from files: Python's standard library, or the user's txt, md, jsonl (plain, gz, zst) and parquet."""

from __future__ import annotations

import glob
import hashlib
import json
import platform
import sysconfig
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from moe_train.config.schema import DataConfig
from moe_train.data.compressed import open_binary
from parallel.errors import DataError

SUFFIXES = (".txt", ".md", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")

# Tables and generated text, a few files of megabytes, would otherwise be a large part of the corpus.
_LARGEST_STDLIB_FILE_BYTES = 300_000
_NOT_STDLIB = {"site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data"}

# A plain text file has no marks between documents. No piece of one is more than 1/200 of the corpus, so that one big
# file too has text for training, validation and test; pieces below the smallest would lose more context than they gain.
_PIECES = 200
_SMALLEST_PIECE_CHARACTERS, _LARGEST_PIECE_CHARACTERS = 4_096, 1_048_576


def source_files(data: DataConfig) -> list[Path]:
    """Files of the corpus in a fixed order.

    Raises:
        DataError: there are none, or one has an unknown suffix.
    """
    if data.source == "stdlib":
        return _stdlib_files()
    if not data.path:
        raise DataError("data.path is not set", f"set data.path to a file, directory or glob of {', '.join(SUFFIXES)}")
    path = Path(data.path)
    if path.is_dir():
        found = [file for file in path.rglob("*") if file.name.endswith(SUFFIXES)]
    else:
        found = [path] if path.is_file() else [Path(name) for name in glob.glob(data.path, recursive=True)]
    own = Path(data.dir).resolve()  # a dataset inside the directory of its text is not text
    found = [file for file in found if file.is_file() and own not in file.resolve().parents]
    if not found:
        raise DataError(f"data.path={data.path} has no {', '.join(SUFFIXES)} file", "correct data.path")
    for file in found:
        if not file.name.endswith(SUFFIXES):
            raise DataError(f"{file} is of an unknown kind", f"name it as one of {', '.join(SUFFIXES)}")
    return sorted(found)


def _stdlib_root() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _stdlib_files() -> list[Path]:
    root = _stdlib_root()
    found = [f for f in root.rglob("*.py") if not _NOT_STDLIB & set(f.relative_to(root).parts)]
    return sorted(f for f in found if 0 < f.stat().st_size <= _LARGEST_STDLIB_FILE_BYTES)


def fingerprint(data: DataConfig, files: list[Path]) -> str:
    """Changes when the corpus does: names, sizes and times of the files (of the standard library, Python's version)."""
    digest = hashlib.sha256()
    if data.source == "stdlib":
        digest.update(platform.python_version().encode())
        lines = [f"{file.relative_to(_stdlib_root())}|{file.stat().st_size}" for file in files]
    else:
        lines = [f"{file}|{file.stat().st_size}|{file.stat().st_mtime_ns}" for file in files]
    digest.update("\n".join(lines).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def documents(data: DataConfig, files: list[Path], done: Callable[[Path], None] = lambda _: None) -> Iterator[str]:
    """Every document once: one whose words were all seen before, in that order, is left out.

    Half of a UTF-16 pair, which JSON can hold and UTF-8 cannot, becomes U+FFFD.

    Args:
        done: called with each file when its last document has been taken.

    Raises:
        DataError: a file cannot be read or understood; the text names the file and the line.
    """
    piece = sum(file.stat().st_size for file in files) // _PIECES
    piece = min(max(piece, _SMALLEST_PIECE_CHARACTERS), _LARGEST_PIECE_CHARACTERS)
    seen: set[bytes] = set()
    for file in files:
        for text in _read(file, data, piece):
            if not text.isascii():
                text = _without_surrogates(text)
            words = " ".join(text.split()).lower()
            key = hashlib.blake2b(words.encode(), digest_size=16).digest()
            if words and key not in seen:
                seen.add(key)
                yield text
        done(file)


def _without_surrogates(text: str) -> str:
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _read(file: Path, data: DataConfig, piece: int) -> Iterator[str]:
    try:
        if data.source == "stdlib":
            # A few of its tests hold text that is wrong on purpose.
            yield file.read_text(encoding="utf-8", errors="ignore")
        elif file.name.endswith((".txt", ".md")):
            yield from _pieces(file, piece)
        elif file.name.endswith(".parquet"):
            yield from _parquet(file, data.text_key)
        else:
            yield from _jsonl(file, data.text_key)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"{file} cannot be read: {reason}", "replace or remove the file") from error


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Lines with their numbers from 1, their ends being \\n."""
    with open_binary(file) as stream:
        for number, raw in enumerate(stream, 1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                cause = f"{file} line {number} is not UTF-8 text (byte {error.start} of the line)"
                raise DataError(cause, "convert the file, for example with iconv") from error
            yield number, line[:-2] + "\n" if line.endswith("\r\n") else line


def _pieces(file: Path, size: int) -> Iterator[str]:
    """The text, cut at the first blank line after `size` characters, or at any line end after twice as many."""
    lines: list[str] = []
    length = 0
    for _, line in _lines(file):
        lines.append(line)
        length += len(line)
        if length >= 2 * size or (length >= size and not line.strip()):
            yield "".join(lines)
            lines, length = [], 0
    yield "".join(lines)


def _jsonl(file: Path, key: str) -> Iterator[str]:
    for number, line in _lines(file):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            raise DataError(f"{file} line {number} is not JSON: {reason}", "correct or remove the line") from error
        text = record.get(key) if isinstance(record, dict) else None
        if not isinstance(text, str):
            fields = (", ".join(record) or "no field") if isinstance(record, dict) else f"a {type(record).__name__}"
            raise DataError(f"{file} line {number} has no text under {key!r} (it has {fields})", "set data.text_key")
        yield text


def _parquet(file: Path, key: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(file) as table:
            if key not in table.schema_arrow.names:
                columns = ", ".join(table.schema_arrow.names)
                raise DataError(f"{file} has no column {key!r} (it has {columns})", "set data.text_key")
            for batch in table.iter_batches(batch_size=1024, columns=[key]):
                for text in batch.column(0).to_pylist():
                    if text is None:
                        continue  # a missing value, which the format has and JSON text has not
                    if not isinstance(text, str):
                        held = type(text).__name__
                        raise DataError(f"{file} column {key!r} holds {held}, not text", "set data.text_key")
                    yield text
    except pyarrow.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{file} is not a whole parquet file: {reason}", "replace or remove the file") from error
