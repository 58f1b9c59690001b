"""Text documents of a corpus, one after the other: what a tokenizer is trained on, and what is scored."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from moe_train.config.schema import DataConfig
from moe_train.data import readers
from moe_train.data.filters import DocumentFilter
from moe_train.data.readers import Document, FileSpan
from moe_train.data.report import Reason, Report

# A plain text file has no marks between documents. No piece of one is more than 1/200 of the corpus, so that one big
# file too has text for training, validation and test; pieces below the smallest would lose more context than they gain.
_PIECES = 200
_SMALLEST_PIECE_CHARACTERS, _LARGEST_PIECE_CHARACTERS = 4_096, 1_048_576


def documents(data: DataConfig, files: Sequence[Path], report: Report | None = None) -> Iterator[str]:
    """Every document of `files` that `data` asks for, in order. It remembers a hash of each.

    Args:
        report: counts what was read, left out and changed.

    Raises:
        DataError: a file cannot be read or understood, and `data` does not say to leave that out; the text names the
            file and the line.
    """
    report = report if report is not None else Report()
    piece = piece_characters(files)
    wanted = DocumentFilter(data)
    seen: set[bytes] = set()
    for file in files:
        report.files += 1
        for document in readers.read(FileSpan(file), data, piece, report):
            report.documents += 1
            text = clean(document, report)
            if reason := wanted.reason(text, document.where):
                report.add(reason, document.where)
                continue
            if data.deduplicate != "none":
                key = key_of(text, data.deduplicate)
                if key in seen:
                    report.add(Reason.DUPLICATE, document.where)
                    continue
                seen.add(key)
            report.kept += 1
            yield text


def piece_characters(files: Sequence[Path]) -> int:
    """Least characters of a document that is cut from a plain text file of this corpus."""
    piece = sum(file.stat().st_size for file in files) // _PIECES
    return min(max(piece, _SMALLEST_PIECE_CHARACTERS), _LARGEST_PIECE_CHARACTERS)


def key_of(text: str, deduplicate: str) -> bytes:
    """16 bytes, equal for texts that count as the same."""
    same = " ".join(text.split()).lower() if deduplicate == "normalized" else text
    return hashlib.blake2b(same.encode(), digest_size=16).digest()


def clean(document: Document, report: Report) -> str:
    """The text with U+FFFD instead of half of a UTF-16 pair, which JSON can hold and UTF-8 cannot."""
    if document.text.isascii():
        return document.text
    try:
        document.text.encode()
        return document.text
    except UnicodeEncodeError:
        joined = document.text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        if "\ufffd" in joined:
            report.add(Reason.REPLACED, document.where)
        return joined
