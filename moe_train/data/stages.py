"""The stages of moe-data that workers run, one function a stage. Each writes its last file when it is done.

parts/read/N.json         what shard N has: counts, rows, parts (with N.kept, N.keys, N.signatures)
parts/duplicates/T-P-OF   rows that table T says to drop, for partition P of OF
parts/N.npy               lengths of the documents of part N (with N.tokens, N.json)
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np

from moe_train.config.schema import DataConfig
from moe_train.data import corpus, duplicates, readers
from moe_train.data.duplicates import KeyWriter, ShardKeys, Tables
from moe_train.data.encoder import Encoder
from moe_train.data.filters import DocumentFilter
from moe_train.data.readers import Document
from moe_train.data.report import Reason, Report
from moe_train.data.shards import CorpusPart, CorpusShard, is_divisible, part_file, spans_of
from moe_train.data.tokenizer import Tokenizer
from moe_train.files import atomic, untrusted
from parallel.errors import DataError

_BATCH_CHARACTERS = 500_000


@dataclass(frozen=True)
class ShardResult:
    """What reading found in a shard.

    Attributes:
        report: of reading and filtering; duplicates are not known yet.
        rows: documents that the filters have kept.
        runs: of `KeyWriter`.
        lines: of its file, where it is a range of one.
    """

    report: Report
    rows: int
    runs: tuple[int, ...]
    lines: int
    parts: tuple[CorpusPart, ...]

    def to_record(self) -> dict[str, Any]:
        """For a file that `from_record` reads."""
        return {
            **asdict(self),
            "report": self.report.to_record(),
            "parts": [list(vars(p).values()) for p in self.parts],
        }

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> ShardResult:
        """The result of which `to_record` made `record`."""
        parts = tuple(CorpusPart(*part) for part in record["parts"])
        report = Report.from_record(record["report"])
        return cls(report, record["rows"], tuple(record["runs"]), record["lines"], parts)


@dataclass(frozen=True)
class PartResult:
    """What tokenising a part found.

    Attributes:
        report: duplicates, with their places.
        documents, tokens: that it has.
        text_bytes: of these documents, as UTF-8.
        fallback: whether gigatoken was not used although that was asked for.
    """

    report: Report
    documents: int
    tokens: int
    text_bytes: int
    fallback: bool

    def to_record(self) -> dict[str, Any]:
        """For a file that `from_record` reads."""
        return {**asdict(self), "report": self.report.to_record()}

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> PartResult:
        """The result of which `to_record` made `record`."""
        return cls(**{**record, "report": Report.from_record(record["report"])})


def shard_file(parts: Path, number: int, suffix: str) -> Path:
    """A file of shard `number`: json, kept, keys or signatures."""
    return parts / "read" / f"{number:06d}.{suffix}"


def duplicates_file(parts: Path, table: int, partition: int, partitions: int) -> Path:
    """Rows to drop by one partition of a table."""
    return parts / "duplicates" / f"{table}-{partition}-{partitions}.npy"


def tables_of(data: DataConfig) -> Tables:
    """The tables of duplicates of a configuration."""
    return Tables(data.deduplicate != "none", data.near_duplicates)


@lru_cache(maxsize=1)
def _filter(least: int, most: int | None, languages: tuple[str, ...], function: str | None) -> DocumentFilter:
    return DocumentFilter(
        DataConfig(min_characters=least, max_characters=most, languages=list(languages), filter=function)
    )


def _filter_of(data: DataConfig) -> DocumentFilter:
    """The filter, kept for the next shard: a language model takes a second to load."""
    return _filter(data.min_characters, data.max_characters, tuple(data.languages), data.filter)


def read_shard(
    parts: Path, number: int, shard: CorpusShard, data: DataConfig, piece_characters: int, part_bytes: int
) -> None:
    """Read and filter a shard, and write the keys of its documents.

    Args:
        data: of its source.
        piece_characters: of `readers.read`.
        part_bytes: of a part, where the shard can be divided.

    Raises:
        DataError: a file or record is at fault.
    """
    tables, wanted, report = tables_of(data), _filter_of(data), Report()
    cutter = _Cutter(shard, part_bytes)
    files = {suffix: shard_file(parts, number, suffix) for suffix in ("kept", "keys", "signatures")}
    lines = readers.Lines()
    with (
        atomic.replacement(files["keys"]) as keys, atomic.replacement(files["signatures"]) as signatures,
        KeyWriter(tables, keys, signatures) as writer,
        atomic.replacement(files["kept"]) as kept, kept.open("xb") as flags,
    ):  # fmt: skip
        for span in shard.spans:
            report.files += span.start == 0
            for document in readers.read(span, data, piece_characters, report, lines):
                report.documents += 1
                text = corpus.clean(document, report)
                reason = wanted.reason(text, document.where)
                if reason is None:
                    report.kept += 1
                    key = corpus.key_of(text, data.deduplicate) if tables.exact else None
                    writer.add(text, key)
                else:
                    report.add(reason, document.where)
                flags.write(b"\1" if reason is None else b"\0")
                cutter.count(document, reason is None)
        if tables.threshold is None:
            signatures.touch()
    if shard.spans[0].start == 0 and shard.spans[0].stop is None:
        lines.count = 0
    result = ShardResult(report, report.kept, tuple(writer.runs), lines.count, cutter.parts())
    atomic.write_text(shard_file(parts, number, "json"), json.dumps(result.to_record()))


class _Cutter:
    """Divides the documents of a shard into parts."""

    def __init__(self, shard: CorpusShard, part_bytes: int) -> None:
        self._shard, self._bytes = shard, part_bytes
        self._divides = is_divisible(shard)
        self._parts: list[CorpusPart] = []
        self._start = self._lines = self._documents = self._rows = 0

    def count(self, document: Document, is_kept: bool) -> None:
        offset = document.offset
        if self._divides and offset is not None and offset - self._start >= self._bytes:
            self._close(offset)
            self._start, self._lines = offset, document.number - 1
        self._documents += 1
        self._rows += is_kept

    def _close(self, stop: int | None) -> None:
        size = self._shard.size - self._start if stop is None else stop - self._start
        self._parts.append(CorpusPart(self._start, stop, self._documents, self._rows, self._lines, size))
        self._documents = self._rows = 0

    def parts(self) -> tuple[CorpusPart, ...]:
        self._close(None)
        return tuple(self._parts)


def read_results(parts: Path, count: int) -> Iterator[ShardResult]:
    """The results of all shards."""
    for number in range(count):
        yield ShardResult.from_record(untrusted.read_object(shard_file(parts, number, "json")))


@lru_cache(maxsize=1)
def shard_keys(parts: Path, count: int) -> list[ShardKeys]:
    """The tables of all shards."""
    found, first = [], 0
    for number, result in enumerate(read_results(parts, count)):
        keys, signatures = (shard_file(parts, number, suffix) for suffix in ("keys", "signatures"))
        found.append(ShardKeys(keys, signatures, first, result.runs))
        first += result.rows
    return found


def find_duplicates(
    parts: Path, shards: int, tables: Tables, table: int, partition: int, partitions: int, memory_bytes: int
) -> None:
    """Write which rows one partition of a table drops. Arguments: as `duplicates.find`."""
    keys = shard_keys(parts, shards)
    rows = duplicates.find(tables, keys, table, partition, partitions, memory_bytes)
    output = duplicates_file(parts, table, partition, partitions)
    with atomic.replacement(output) as temporary, temporary.open("xb") as file:
        np.save(file, rows)


@dataclass(frozen=True)
class Tokenising:
    """What the parts of a dataset have in common.

    Attributes:
        tokenizer: its tokenizer.json.
        dtype: of a token.
        partitions: of the tables of duplicates.
    """

    parts: Path
    tokenizer: Path
    dtype: np.dtype[Any]
    tables: Tables
    partitions: int
    piece_characters: int


@lru_cache(maxsize=1)
def _tokenizer(path: Path, eod: str | None, bos: str | None, parse_special_tokens: bool) -> Tokenizer:
    return Tokenizer(path, eod, bos, parse_special_tokens)


def tokenize_part(
    common: Tokenising, number: int, shard_number: int, shard: CorpusShard, data: DataConfig, part: CorpusPart,
    documents_before: int, first_row: int,
) -> None:  # fmt: skip
    """Tokenise the documents of a part, without duplicates.

    Args:
        number: of the part.
        data: of the source of the shard.
        documents_before: of the shard, in earlier parts.
        first_row: of the corpus, of this part.
    """
    tokenizer = _tokenizer(common.tokenizer, data.eod_token, data.bos_token, data.parse_special_tokens)
    encoder = Encoder(tokenizer, data.prepare_tokenizer)
    begin = [tokenizer.bos] if data.prepend_bos else []
    end = [tokenizer.eod] if data.append_eod else []
    files = {suffix: part_file(common.parts, number, suffix) for suffix in ("tokens", "json", "npy")}
    report, lengths, text_bytes = Report(), [np.empty(0, np.int64)], 0
    wanted = _WantedRows(common, shard_number, part, documents_before, first_row)
    texts = _texts(common, shard, data, part, wanted, report)
    with atomic.replacement(files["tokens"]) as temporary, temporary.open("xb") as stream:
        for batch in _batches(texts):
            text_bytes += sum(len(text) if text.isascii() else len(text.encode()) for text in batch)
            lengths.append(_write(stream, encoder(batch, common.dtype), begin, end, common.dtype))
    all_lengths = np.concatenate(lengths)
    result = PartResult(report, len(all_lengths), int(all_lengths.sum()), text_bytes, encoder.fallback)
    atomic.write_text(files["json"], json.dumps(result.to_record()))
    with atomic.replacement(files["npy"]) as temporary, temporary.open("xb") as file:
        np.save(file, all_lengths)


def _write(
    stream: IO[bytes], ids: Sequence[np.ndarray], begin: list[int | None], end: list[int], dtype: np.dtype[Any]
) -> np.ndarray:
    """Append documents to a file of tokens. Returns their lengths."""
    first, last = np.asarray(begin, dtype), np.asarray(end, dtype)
    pieces = [piece for document in ids for piece in (first, document, last)]
    stream.write(np.concatenate(pieces).tobytes())
    return np.array([len(first) + len(document) + len(last) for document in ids], np.int64)


class _WantedRows:
    """Why each document of a part is left out, where it is."""

    def __init__(
        self, common: Tokenising, shard_number: int, part: CorpusPart, documents_before: int, first_row: int
    ) -> None:
        kept = shard_file(common.parts, shard_number, "kept")
        self.kept = np.fromfile(kept, np.uint8, part.documents, offset=documents_before).astype(bool)
        self.exact, self.near = (np.zeros(part.rows, bool) for _ in range(2))
        for table in range(common.tables.count):
            flags = self.exact if common.tables.is_exact(table) else self.near
            for partition in range(common.partitions):
                path = duplicates_file(common.parts, table, partition, common.partitions)
                rows = np.load(path, mmap_mode="r", allow_pickle=False)
                i, j = np.searchsorted(rows, [first_row, first_row + part.rows])
                flags[rows[i:j] - first_row] = True


def _texts(
    common: Tokenising, shard: CorpusShard, data: DataConfig, part: CorpusPart, wanted: _WantedRows, report: Report
) -> Iterator[str]:
    """The documents of a part that are kept. What was counted when the shard was read is not counted again."""
    ignored, row = Report(), 0
    documents = (
        document for span in spans_of(shard, part)
        for document in readers.read(span, data, common.piece_characters, ignored)
    )  # fmt: skip
    for is_kept in wanted.kept:
        document = next(documents, None)
        if document is None:
            raise DataError(f"{shard.spans[0].file} has changed while it was read", "run the command again")
        if not is_kept:
            continue
        if wanted.exact[row] or wanted.near[row]:
            reason = Reason.DUPLICATE if wanted.exact[row] else Reason.NEAR_DUPLICATE
            report.add(reason, document.where.after(part.lines) if document.unit else document.where)
        else:
            yield corpus.clean(document, ignored)
        row += 1


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    """Texts in lists of about `_BATCH_CHARACTERS`."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
