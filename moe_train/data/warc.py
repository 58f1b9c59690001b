"""Documents of WARC files, through fastwarc: text records, as Common Crawl's WET files have."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from moe_train.config.schema import DataConfig
from moe_train.data.compressed import open_binary
from moe_train.data.readers import BadFileError, BadRecordError, Document, FileSpan, bad_record
from moe_train.data.report import Report, TextPlace
from parallel.errors import DataError

if TYPE_CHECKING:
    from fastwarc.warc import WarcRecord, WarcRecordType


def documents(file: Path, data: DataConfig, report: Report) -> Iterator[Document]:
    """The text of each `conversion` record, and of each `resource` record of type text/plain.

    Raises:
        DataError: fastwarc is missing, or a record is not text and `data` does not say to leave that out.
        BadFileError: the file is damaged.
    """
    try:
        from fastwarc.warc import ArchiveIterator, WarcRecordType
    except ImportError as error:
        raise DataError(
            f"{file} needs fastwarc, which is not installed", "pip install 'moe-train[data]', or narrow data.path"
        ) from error
    # fastwarc takes the early end of a compressed file for its end; `open_binary` does not.
    with open_binary(file) as stream:
        records = ArchiveIterator(stream, parse_http=False, stream_detect=False)
        for number, record in enumerate(records, 1):
            if not _is_text(record, WarcRecordType):
                continue
            content = record.reader.read()
            if "Content-Length" not in record.headers or len(content) != record.content_length:
                raise BadFileError(TextPlace(str(file), "record", number, " is cut off"), "replace or remove the file")
            try:
                text = content.decode(data.encoding)
            except UnicodeDecodeError as error:
                wrong = TextPlace(str(file), "record", number, f" is not {data.encoding} text (byte {error.start})")
                bad_record(BadRecordError(wrong, "correct or remove the record"), FileSpan(file), data, report)
                continue
            yield Document(text, file, "record", number)


def _is_text(record: WarcRecord, kinds: type[WarcRecordType]) -> bool:
    """Whether the record has text, or may have had it before the file was cut off."""
    if record.record_type in (kinds.conversion, kinds.unknown) or "Content-Length" not in record.headers:
        return True
    return record.record_type == kinds.resource and str(record.headers.get("Content-Type")).startswith("text/plain")
