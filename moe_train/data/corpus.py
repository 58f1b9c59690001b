"""Text documents from files: Python's standard library, or the user's txt, md, jsonl (plain, gz, zst) and parquet."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_train.config.schema import DataConfig
from moe_train.data.compressed import open_binary
from moe_train.data.report import Reason, Report
from parallel.errors import DataError

# A plain text file has no marks between documents. No piece of one is more than 1/200 of the corpus, so that one big
# file too has text for training, validation and test; pieces below the smallest would lose more context than they gain.
_PIECES = 200
_SMALLEST_PIECE_CHARACTERS, _LARGEST_PIECE_CHARACTERS = 4_096, 1_048_576


@dataclass
class _Document:
    text: str
    where: str
    """The file, and the line where it has several documents."""


def documents(
    data: DataConfig, files: list[Path], done: Callable[[Path], None] = lambda _: None, report: Report | None = None
) -> Iterator[str]:
    """Every document that `data` asks for, in order.

    Half of a UTF-16 pair, which JSON can hold and UTF-8 cannot, becomes U+FFFD.

    Args:
        done: called with each file when its last document has been taken.
        report: counts what was read, left out and changed.

    Raises:
        DataError: a file cannot be read or understood, and `data` does not say to leave that out; the text names the
            file and the line.
    """
    report = report if report is not None else Report()
    piece = sum(file.stat().st_size for file in files) // _PIECES
    piece = min(max(piece, _SMALLEST_PIECE_CHARACTERS), _LARGEST_PIECE_CHARACTERS)
    seen: set[bytes] = set()
    for file in files:
        report.files += 1
        for document in _read(file, data, piece, report):
            report.documents += 1
            text = document.text if document.text.isascii() else _without_surrogates(document, report)
            if len(text.strip()) < data.min_characters:
                report.add(Reason.SHORT, document.where)
                continue
            if data.deduplicate != "none":
                key = _key(text, data.deduplicate)
                if key in seen:
                    report.add(Reason.DUPLICATE, document.where)
                    continue
                seen.add(key)
            report.kept += 1
            yield text
        done(file)


def _key(text: str, deduplicate: str) -> bytes:
    """Equal for texts that count as the same."""
    same = " ".join(text.split()).lower() if deduplicate == "normalized" else text
    return hashlib.blake2b(same.encode(), digest_size=16).digest()


def _without_surrogates(document: _Document, report: Report) -> str:
    try:
        document.text.encode()
        return document.text
    except UnicodeEncodeError:
        joined = document.text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        if "\ufffd" in joined:
            report.add(Reason.REPLACED, document.where)
        return joined


def _read(file: Path, data: DataConfig, piece: int, report: Report) -> Iterator[_Document]:
    try:
        if data.source == "stdlib":
            yield _source(file, report)
        elif file.name.endswith((".txt", ".md")):
            yield from _pieces(file, data, piece)
        elif file.name.endswith(".parquet"):
            yield from _parquet(file, data, report)
        else:
            yield from _jsonl(file, data, report)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        _unreadable(DataError(f"{file} cannot be read: {reason}", "replace or remove the file"), file, data, report)
    except _BadFileError as error:
        _unreadable(error, file, data, report)


class _BadFileError(DataError):
    """A file cannot be understood from some place on."""


class _BadRecordError(DataError):
    """One record of a file has no text."""


def _unreadable(error: DataError, file: Path, data: DataConfig, report: Report) -> None:
    """Raise `error`, or count the file where that is asked for. Documents before the damage are kept."""
    if data.bad_records == "error":
        raise DataError(error.cause, f"{error.remedy}, or leave such files out with data.bad_records=skip") from error
    report.add(Reason.BAD_FILE, error.cause)


def _source(file: Path, report: Report) -> _Document:
    """A file of the standard library, a few of whose tests hold text that is wrong on purpose."""
    content = file.read_bytes()
    text = content.decode("utf-8", "ignore")
    if len(text.encode()) != len(content):
        report.add(Reason.UNDECODED, file)
    return _Document(text.replace("\r\n", "\n").replace("\r", "\n"), str(file))


def _lines(file: Path, encoding: str) -> Iterator[tuple[int, str | _BadRecordError]]:
    """Lines with their numbers from 1, with \\n as line end; an error instead of a line that cannot be decoded."""
    with open_binary(file) as stream:
        for number, raw in enumerate(stream, 1):
            mark = number == 1 and encoding == "utf-8"
            try:
                line = raw.decode("utf-8-sig" if mark else encoding)
            except UnicodeDecodeError as error:
                name = "UTF-8" if encoding == "utf-8" else encoding
                yield (
                    number,
                    _BadRecordError(
                        f"{file} line {number} is not {name} text (byte {error.start} of the line)",
                        "set data.encoding, or convert the file, for example with iconv",
                    ),
                )
            else:
                yield number, line[:-2] + "\n" if line.endswith("\r\n") else line


def _pieces(file: Path, data: DataConfig, size: int) -> Iterator[_Document]:
    """The text, cut at the first blank line after `size` characters, or at any line end after twice as many."""
    lines: list[str] = []
    length, first = 0, 1
    for number, line in _lines(file, data.encoding):
        if isinstance(line, _BadRecordError):
            raise _BadFileError(line.cause, line.remedy) from line
        lines.append(line)
        length += len(line)
        if length >= 2 * size or (length >= size and not line.strip()):
            yield _Document("".join(lines), f"{file} line {first}")
            lines, length, first = [], 0, number + 1
    if lines:
        yield _Document("".join(lines), f"{file} line {first}")


def _jsonl(file: Path, data: DataConfig, report: Report) -> Iterator[_Document]:
    for number, line in _lines(file, data.encoding):
        where = f"{file} line {number}"
        try:
            if isinstance(line, _BadRecordError):
                raise line
            if not line.strip():
                continue
            text = _text_of(line, where, data.text_key)
        except _BadRecordError as error:
            _bad_record(error, data, report)
            continue
        if text is None:
            _null(where, data, report)
        else:
            yield _Document(text, where)


def _text_of(line: str, where: str, key: str) -> str | None:
    """The text of a record; None where it is null."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise _BadRecordError(f"{where} is not JSON: {reason}", "correct or remove the line") from error
    if not isinstance(record, dict):
        actual_type = f"a {type(record).__name__}"
        raise _BadRecordError(f"{where} has no text under {key!r} (it has {actual_type})", "correct or remove the line")
    if key not in record:
        fields = ", ".join(record) or "no field"
        raise _BadRecordError(f"{where} has no text under {key!r} (it has {fields})", "set data.text_key")
    text = record[key]
    if text is not None and not isinstance(text, str):
        actual_type = type(text).__name__
        raise _BadRecordError(f"{where} has no text under {key!r} (it holds {actual_type})", "set data.text_key")
    return text


def _bad_record(error: DataError, data: DataConfig, report: Report) -> None:
    """Raise `error`, or count the record where that is asked for."""
    if data.bad_records == "error":
        raise DataError(error.cause, f"{error.remedy}, or leave such records out with data.bad_records=skip") from error
    report.documents += 1
    report.add(Reason.BAD_RECORD, error.cause)


def _null(where: str, data: DataConfig, report: Report) -> None:
    """Count a record whose text is null, or raise an error where that is asked for."""
    if data.null_text == "error":
        raise DataError(f"{where} has null under {data.text_key!r}", "correct the record, or set data.null_text=skip")
    report.documents += 1
    report.add(Reason.NULL, where)


def _parquet(file: Path, data: DataConfig, report: Report) -> Iterator[_Document]:
    import pyarrow
    import pyarrow.parquet as parquet

    key, row = data.text_key, 0
    try:
        with parquet.ParquetFile(file) as table:
            if key not in table.schema_arrow.names:
                columns = ", ".join(table.schema_arrow.names)
                raise _BadFileError(f"{file} has no column {key!r} (it has {columns})", "set data.text_key")
            for batch in table.iter_batches(batch_size=1024, columns=[key]):
                for value in _values(batch.column(0)):
                    row += 1
                    where = f"{file} row {row}"
                    if value is None:
                        _null(where, data, report)
                    elif isinstance(value, str):
                        yield _Document(value, where)
                    elif isinstance(value, UnicodeDecodeError):
                        wrong = f"{where} is not UTF-8 text (byte {value.start})"
                        _bad_record(_BadRecordError(wrong, "correct or remove the row"), data, report)
                    else:
                        actual_type = type(value).__name__
                        raise _BadFileError(f"{file} column {key!r} holds {actual_type}, not text", "set data.text_key")
    except pyarrow.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise _BadFileError(f"{file} is not a whole parquet file: {reason}", "replace or remove the file") from error


def _values(column: Any) -> Iterator[Any]:
    """The values of a column; an error instead of text that is not UTF-8, which the format does not exclude."""
    try:
        yield from column.to_pylist()
    except UnicodeDecodeError:
        for value in column:
            try:
                yield value.as_py()
            except UnicodeDecodeError as error:
                yield error
