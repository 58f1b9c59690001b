"""Documents of one file: txt, md, jsonl (plain, gz, zst), parquet, WARC, and source code of the standard library."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_train.config.schema import DataConfig
from moe_train.data.compressed import open_binary
from moe_train.data.files import PLAIN_TEXT, WARC
from moe_train.data.report import Reason, Report, TextPlace
from parallel.errors import DataError

_CHUNK_BYTES = 2**20


@dataclass(frozen=True)
class FileSpan:
    """A file, or the lines that begin in a range of its bytes.

    Attributes:
        start, stop: bytes; None for `stop` means the end of the file.
    """

    file: Path
    start: int = 0
    stop: int | None = None


@dataclass
class Document:
    """Text, and its place.

    Attributes:
        unit, number: as in `TextPlace`, `number` being counted from the start of the `FileSpan`.
        offset: byte at which it begins in a file that is not compressed; None in other files.
    """

    text: str
    file: Path
    unit: str = ""
    number: int = 0
    offset: int | None = None

    @property
    def where(self) -> TextPlace:
        """The place of the document."""
        return TextPlace(str(self.file), self.unit, self.number)


@dataclass
class Lines:
    """How many lines of a span have been read."""

    count: int = 0


def read(
    span: FileSpan, data: DataConfig, piece_characters: int, report: Report, lines: Lines | None = None
) -> Iterator[Document]:
    """The documents of a file.

    Args:
        piece_characters: least characters of a document of a plain text file, which has no marks between documents.
        report: counts records and files that are left out.
        lines: counts the lines that have been read.

    Raises:
        DataError: the file, or a record, cannot be understood, and `data` does not say to leave that out.
    """
    file = span.file
    lines = lines or Lines()
    try:
        if data.source == "stdlib":
            yield _source(file, report)
        elif file.name.endswith(PLAIN_TEXT):
            yield from _pieces(span, data, piece_characters, lines)
        elif file.name.endswith(".parquet"):
            yield from _parquet(file, data, report)
        elif file.name.endswith(WARC):
            from moe_train.data.warc import documents

            yield from documents(file, data, report)
        else:
            yield from _jsonl(span, data, report, lines)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        bad = BadFileError(TextPlace(str(file), problem=f" cannot be read: {reason}"), "replace or remove the file")
        _unreadable(bad, span, data, report)
    except BadFileError as error:
        _unreadable(error, span, data, report)


class _BadError(Exception):
    def __init__(self, place: TextPlace, remedy: str) -> None:
        super().__init__(str(place))
        self.place, self.remedy = place, remedy


class BadFileError(_BadError):
    """A file cannot be understood from some place on."""


class BadRecordError(_BadError):
    """One record of a file has no text."""


def _absolute(place: TextPlace, span: FileSpan) -> TextPlace:
    """The place counted from the start of the file, for an error: reads all that is before the span."""
    if not (place.unit and span.start):
        return place
    left, count = _first_line(span), 0
    with open(span.file, "rb") as stream:
        while left and (chunk := stream.read(min(left, _CHUNK_BYTES))):
            count, left = count + chunk.count(b"\n"), left - len(chunk)
    return place.after(count)


def _unreadable(error: BadFileError, span: FileSpan, data: DataConfig, report: Report) -> None:
    """Raise `error`, or count the file where that is asked for. Documents before the damage are kept."""
    if data.bad_records == "error":
        remedy = f"{error.remedy}, or leave such files out with data.bad_records=skip"
        raise DataError(str(_absolute(error.place, span)), remedy) from error
    report.add(Reason.BAD_FILE, error.place)


def bad_record(error: BadRecordError, span: FileSpan, data: DataConfig, report: Report) -> None:
    """Raise `error`, or count the record where that is asked for."""
    if data.bad_records == "error":
        remedy = f"{error.remedy}, or leave such records out with data.bad_records=skip"
        raise DataError(str(_absolute(error.place, span)), remedy) from error
    report.documents += 1
    report.add(Reason.BAD_RECORD, error.place)


def _null(where: TextPlace, span: FileSpan, data: DataConfig, report: Report) -> None:
    """Count a record whose text is null, or raise an error where that is asked for."""
    if data.null_text == "error":
        place = _absolute(where, span)
        raise DataError(f"{place} has null under {data.text_key!r}", "correct the record, or set data.null_text=skip")
    report.documents += 1
    report.add(Reason.NULL, where)


def _source(file: Path, report: Report) -> Document:
    """A file of the standard library, a few of whose tests hold text that is wrong on purpose."""
    content = file.read_bytes()
    text = content.decode("utf-8", "ignore")
    if len(text.encode()) != len(content):
        report.add(Reason.UNDECODED, file)
    return Document(text.replace("\r\n", "\n").replace("\r", "\n"), file)


def _first_line(span: FileSpan) -> int:
    """Byte of the first line that begins in the span."""
    if not span.start:
        return 0
    with open(span.file, "rb") as stream:
        stream.seek(span.start - 1)
        stream.readline()
        return stream.tell()


def _lines(span: FileSpan, encoding: str, lines: Lines) -> Iterator[tuple[int, int, str | BadRecordError]]:
    """Number from 1, first byte and text of each line, with \\n as line end; an error instead of text that cannot be
    decoded."""
    with open_binary(span.file) as stream:
        offset = _first_line(span)
        if offset:
            stream.seek(offset)
        for number, raw in enumerate(stream, 1):
            if span.stop is not None and offset >= span.stop:
                return
            lines.count = number
            mark = offset == 0 and encoding == "utf-8"
            try:
                line = raw.decode("utf-8-sig" if mark else encoding)
            except UnicodeDecodeError as error:
                name = "UTF-8" if encoding == "utf-8" else encoding
                problem = f" is not {name} text (byte {error.start} of the line)"
                remedy = "set data.encoding, or convert the file, for example with iconv"
                yield number, offset, BadRecordError(TextPlace(str(span.file), "line", number, problem), remedy)
            else:
                yield number, offset, line[:-2] + "\n" if line.endswith("\r\n") else line
            offset += len(raw)


def _pieces(span: FileSpan, data: DataConfig, size: int, lines: Lines) -> Iterator[Document]:
    """The text, cut at the first blank line after `size` characters, or at any line end after twice as many."""
    piece: list[str] = []
    length, first, begin = 0, 1, span.start
    for number, offset, line in _lines(span, data.encoding, lines):
        if isinstance(line, BadRecordError):
            raise BadFileError(line.place, line.remedy) from line
        if not piece:
            first, begin = number, offset
        piece.append(line)
        length += len(line)
        if length >= 2 * size or (length >= size and not line.strip()):
            yield Document("".join(piece), span.file, "line", first, begin)
            piece, length = [], 0
    if piece:
        yield Document("".join(piece), span.file, "line", first, begin)


def _jsonl(span: FileSpan, data: DataConfig, report: Report, lines: Lines) -> Iterator[Document]:
    is_plain = span.file.name.endswith(".jsonl")
    for number, offset, line in _lines(span, data.encoding, lines):
        try:
            if isinstance(line, BadRecordError):
                raise line
            if not line.strip():
                continue
            text = _text_of(line, TextPlace(str(span.file), "line", number), data.text_key)
        except BadRecordError as error:
            bad_record(error, span, data, report)
            continue
        if text is None:
            _null(TextPlace(str(span.file), "line", number), span, data, report)
        else:
            yield Document(text, span.file, "line", number, offset if is_plain else None)


def _text_of(line: str, place: TextPlace, key: str) -> str | None:
    """The text of a record; None where it is null."""

    def bad(problem: str, remedy: str) -> BadRecordError:
        return BadRecordError(TextPlace(place.file, place.unit, place.number, problem), remedy)

    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise bad(f" is not JSON: {reason}", "correct or remove the line") from error
    if not isinstance(record, dict):
        actual_type = f"a {type(record).__name__}"
        raise bad(f" has no text under {key!r} (it has {actual_type})", "correct or remove the line")
    text: Any = record
    for name in [key] if key in record else key.split("."):
        if text is None:
            return None
        if not isinstance(text, dict) or name not in text:
            found = text if isinstance(text, dict) else record
            fields = ", ".join(found) or "no field"
            raise bad(f" has no text under {key!r} (it has {fields})", "set data.text_key")
        text = text[name]
    if text is not None and not isinstance(text, str):
        actual_type = type(text).__name__
        raise bad(f" has no text under {key!r} (it holds {actual_type})", "set data.text_key")
    return text


def _parquet(file: Path, data: DataConfig, report: Report) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet as parquet

    key, row = data.text_key, 0
    try:
        with parquet.ParquetFile(file) as table:
            names = [key] if key in table.schema_arrow.names else key.split(".")
            _check_column(file, table.schema_arrow, key, names)
            for batch in table.iter_batches(batch_size=1024, columns=[key]):
                for value in _values(_nested(batch.column(0), names[1:])):
                    row += 1
                    place = TextPlace(str(file), "row", row)
                    if value is None:
                        _null(place, FileSpan(file), data, report)
                    elif isinstance(value, str):
                        yield Document(value, file, "row", row)
                    elif isinstance(value, UnicodeDecodeError):
                        wrong = TextPlace(str(file), "row", row, f" is not UTF-8 text (byte {value.start})")
                        bad_record(BadRecordError(wrong, "correct or remove the row"), FileSpan(file), data, report)
                    else:
                        problem = f" column {key!r} holds {type(value).__name__}, not text"
                        raise BadFileError(TextPlace(str(file), problem=problem), "set data.text_key")
    except pyarrow.ArrowException as error:
        reason = str(error).splitlines()[0]
        problem = f" is not a whole parquet file: {reason}"
        raise BadFileError(TextPlace(str(file), problem=problem), "replace or remove the file") from error


def _check_column(file: Path, schema: Any, key: str, names: list[str]) -> None:
    """Raise BadFileError where the file has no column `key`, or no field of it."""
    fields = {field.name: field.type for field in schema}
    for number, name in enumerate(names):
        if name not in fields:
            inside = f" in {'.'.join(names[:number])}" if number else ""
            problem = f" has no column {key!r} (it has {', '.join(fields) or 'none'}{inside})"
            raise BadFileError(TextPlace(str(file), problem=problem), "set data.text_key")
        kind = fields[name]
        fields = {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)}


def _nested(column: Any, names: list[str]) -> Any:
    import pyarrow.compute as compute

    return compute.struct_field(column, names) if names else column


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
