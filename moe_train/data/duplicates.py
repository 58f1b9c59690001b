"""Which rows of a corpus repeat an earlier one, with tables on disk and bounded memory.

A row is a document that the filters have kept; rows count from 0 over the whole corpus, in its order. Reading writes
tables of keys for each shard: one of hashes of the text, and one for each LSH band of MinHash signatures. Each run of a
table is sorted, so that the rows whose keys begin with the same bits are read at once. Rows of one key are candidates:

- with equal hashes of the text, all but the first are duplicates;
- in a band, each row is compared with the first row that has not turned out to be a near-duplicate yet, over several
  rounds. A row is dropped if an earlier row has an estimated Jaccard similarity of at least the threshold to it.

Nothing of this depends on the number of processes, or on how many partitions the keys are divided into.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from moe_train.data import minhash

_RUN_ROWS = 50_000
_BATCH_CHARACTERS = 1_000_000
BYTES_PER_ROW = 96  # of a partition: two keys and a row, and sorting them
_ROUNDS = 16
_KEY, _ROW, _SIGNATURE = np.dtype("<u8"), np.dtype("<u4"), np.dtype("<u2")
_SIGNATURE_BYTES = minhash.PERMUTATIONS * _SIGNATURE.itemsize


@dataclass(frozen=True)
class Tables:
    """The tables of a configuration.

    Attributes:
        exact: whether there is a table of hashes; it is the first.
        threshold: of near-duplicates; None without bands.
    """

    exact: bool
    threshold: float | None

    @property
    def bands(self) -> tuple[int, int]:
        """Number of bands, and rows of a signature in each."""
        return minhash.bands_of(self.threshold) if self.threshold is not None else (0, 0)

    @property
    def count(self) -> int:
        """Number of tables."""
        return self.exact + self.bands[0]

    def is_exact(self, table: int) -> bool:
        """Whether the table has hashes of texts."""
        return self.exact and table == 0

    def offset(self, table: int, rows: int) -> int:
        """First byte of a table in a run of `rows`."""
        wide, narrow = 2 * _KEY.itemsize + _ROW.itemsize, _KEY.itemsize + _ROW.itemsize
        return rows * (wide * min(table, int(self.exact)) + narrow * max(0, table - self.exact))


@dataclass
class _Run:
    hashes: list[bytes] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    characters: int = 0
    signatures: list[np.ndarray] = field(default_factory=list)
    rows: int = 0


class KeyWriter:
    """Writes the tables and signatures of one shard.

    Args:
        keys, signatures: files.

    Attributes:
        runs: rows of each run so far.
    """

    def __init__(self, tables: Tables, keys: Path, signatures: Path) -> None:
        self._tables, self._run = tables, _Run()
        self.runs: list[int] = []
        self._keys: IO[bytes] = keys.open("xb")
        self._signatures: IO[bytes] | None = signatures.open("xb") if tables.threshold is not None else None

    def __enter__(self) -> KeyWriter:
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self._flush()
        self._keys.close()
        if self._signatures is not None:
            self._signatures.close()

    def add(self, text: str, key: bytes | None) -> None:
        """The next row, with the hash of its text where there is a table of hashes."""
        run = self._run
        run.rows += 1
        if key is not None:
            run.hashes.append(key)
        if self._signatures is not None:
            run.texts.append(text)
            run.characters += len(text)
            if run.characters >= _BATCH_CHARACTERS:
                self._sign()
        if run.rows == _RUN_ROWS:
            self._flush()

    def _sign(self) -> None:
        if self._run.texts:
            self._run.signatures.append(minhash.signatures(self._run.texts))
            self._run.texts, self._run.characters = [], 0

    def _flush(self) -> None:
        self._sign()
        run, self._run = self._run, _Run()
        if not run.rows:
            return
        if run.hashes:
            high, low = np.frombuffer(b"".join(run.hashes), ">u8").reshape(-1, 2).T.astype(_KEY)
            order = np.lexsort((low, high))
            self._write(high[order], low[order], order.astype(_ROW))
        if self._signatures is not None:
            found = np.concatenate(run.signatures)
            count, rows = self._tables.bands
            for band in range(count):
                keys = minhash.band_keys(found, band, rows)
                order = np.argsort(keys, kind="stable")
                self._write(keys[order], order.astype(_ROW))
            found.astype(_SIGNATURE).tofile(self._signatures)  # the low bits differ wherever the values do, nearly
        self.runs.append(run.rows)

    def _write(self, *arrays: np.ndarray) -> None:
        for array in arrays:
            array.tofile(self._keys)


@dataclass(frozen=True)
class ShardKeys:
    """Files of the tables of one shard.

    Attributes:
        first: row of the corpus that is its first.
        runs: rows of each run.
    """

    keys: Path
    signatures: Path
    first: int
    runs: tuple[int, ...]


def partitions_of(rows: int, memory_bytes: int) -> int:
    """Into how many parts the keys of a table are divided, so that one fits into memory."""
    return max(1, -(-rows * BYTES_PER_ROW // memory_bytes))


def find(
    tables: Tables, shards: Sequence[ShardKeys], table: int, partition: int, partitions: int, memory_bytes: int
) -> np.ndarray:
    """Rows that repeat an earlier one by the keys of one partition of a table, ascending, int64.

    Args:
        memory_bytes: for signatures that are compared at once.
    """
    high, low, rows = _load(tables, shards, table, partition, partitions)
    order = np.lexsort((rows, low, high))
    high, low, rows = high[order], low[order], rows[order]
    del order
    same = np.zeros(len(rows), bool)
    same[1:] = (high[1:] == high[:-1]) & (low[1:] == low[:-1])
    if tables.is_exact(table):
        return np.sort(rows[same])
    several = same.copy()
    several[:-1] |= same[1:]
    groups = np.cumsum(~same)[several]
    assert tables.threshold is not None
    return _near(groups, rows[several], shards, tables.threshold, memory_bytes)


def _load(
    tables: Tables, shards: Sequence[ShardKeys], table: int, partition: int, partitions: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keys (high and low half; the low one of a band is 0) and rows of one partition, in the order of the runs."""
    found = list(_slices(tables, shards, table, partition, partitions))
    kinds: tuple[np.dtype[Any], ...] = (_KEY, _KEY, np.dtype(np.int64))
    high, low, rows = (
        np.concatenate([np.empty(0, kind), *(piece[i] for piece in found)]) for i, kind in enumerate(kinds)
    )
    return high, low, rows


def _slices(
    tables: Tables, shards: Sequence[ShardKeys], table: int, partition: int, partitions: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    begin, end = (partition * 2**64 // partitions, (partition + 1) * 2**64 // partitions - 1)
    wide = tables.is_exact(table)
    for shard in shards:
        offset, first = 0, shard.first
        for count in shard.runs:
            at = offset + tables.offset(table, count)
            keys = np.memmap(shard.keys, _KEY, "r", at, (count,))
            i = int(np.searchsorted(keys, np.uint64(begin), "left"))
            j = int(np.searchsorted(keys, np.uint64(end), "right"))
            halves = _read(shard.keys, _KEY, at + (count + i) * 8, j - i) if wide else np.zeros(j - i, _KEY)
            at += count * _KEY.itemsize * (1 + wide)
            rows = _read(shard.keys, _ROW, at + i * _ROW.itemsize, j - i).astype(np.int64)
            yield np.array(keys[i:j]), halves, rows + first
            offset += tables.offset(tables.count, count)
            first += count


def _read(path: Path, kind: np.dtype[Any], offset: int, count: int) -> np.ndarray:
    return np.fromfile(path, kind, count, offset=offset)


def _near(
    groups: np.ndarray, rows: np.ndarray, shards: Sequence[ShardKeys], threshold: float, memory_bytes: int
) -> np.ndarray:
    """Rows of the groups that are near-duplicates of an earlier row of their group.

    Args:
        groups, rows: sorted by group and row.
    """
    firsts = np.array([shard.first for shard in shards], np.int64)
    dropped: list[np.ndarray] = []
    for _ in range(_ROUNDS):
        begins = np.concatenate([[True], groups[1:] != groups[:-1]]) if len(groups) else np.empty(0, bool)
        leaders = rows[begins][np.cumsum(begins) - 1][~begins]
        groups, rows = groups[~begins], rows[~begins]
        if not len(rows):
            break
        equal = np.zeros(len(rows), bool)
        step = max(1, memory_bytes // (4 * _SIGNATURE_BYTES))
        for i in range(0, len(rows), step):
            one, other = (_gather(part[i : i + step], shards, firsts) for part in (leaders, rows))
            equal[i : i + step] = (one == other).mean(axis=1) >= threshold
        dropped.append(rows[equal])
        groups, rows = groups[~equal], rows[~equal]
    return np.unique(np.concatenate([np.empty(0, np.int64), *dropped]))


def _gather(rows: np.ndarray, shards: Sequence[ShardKeys], firsts: np.ndarray) -> np.ndarray:
    """Signatures of rows, uint16 [rows, PERMUTATIONS]."""
    # Of several shards that begin with the same row all but the last are empty.
    owners = np.searchsorted(firsts, rows, "right") - 1
    result = np.empty((len(rows), minhash.PERMUTATIONS), _SIGNATURE)
    for owner in np.unique(owners):
        own = owners == owner
        count = sum(shards[owner].runs)
        stored = np.memmap(shards[owner].signatures, _SIGNATURE, "r", 0, (count, minhash.PERMUTATIONS))
        result[own] = stored[rows[own] - firsts[owner]]
    return result
