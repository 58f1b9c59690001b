"""Parts of tokenised documents -> one .bin/.idx pair in a random order, with bounded memory.

`order` writes for each document of the dataset where its tokens are. `gather` copies those of one segment, several
processes at once; `join` puts the segments end to end and writes the index.
"""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe_train.data.index_file import HEADER, MAGIC, code_of
from moe_train.data.shards import part_file
from moe_train.files import atomic
from parallel.errors import DataError

_SEED = 0  # fixed, so that every run splits the same documents into training and validation
_CHUNK = 2**20  # documents at once
_COPY_BYTES = 2**24


@dataclass(frozen=True)
class Order:
    """Files of an order: one number for each document, in the order of the dataset.

    Attributes:
        folder: of the files.
        segment_tokens: about so many tokens are gathered at once.
    """

    folder: Path
    segment_tokens: int

    def file(self, name: str) -> Path:
        """part, start (tokens of the part before the document), size (tokens) or end (tokens of the dataset)."""
        return self.folder / f"{name}.npy"

    @property
    def done(self) -> Path:
        """Written last."""
        return self.folder / "done"

    def read(self, name: str) -> np.ndarray:
        """One of the arrays, memory-mapped."""
        return np.load(self.file(name), mmap_mode="r", allow_pickle=False)

    def segment(self, number: int) -> Path:
        """Tokens of one segment."""
        return self.folder / f"{number:06d}-{self.segment_tokens}.segment"


def order(parts: Path, first: int, last: int, result: Order) -> None:
    """Shuffle the documents of parts `first` to `last` - 1, without those of no tokens."""
    result.folder.mkdir(parents=True, exist_ok=True)
    counts = np.array([_count(parts, number) for number in range(first, last)], np.int64)
    sizes, begins = (_array(result.folder / f"{name}.tmp", int(counts.sum())) for name in ("sizes", "begins"))
    at = 0
    for number, count in zip(range(first, last), counts, strict=True):
        lengths = np.load(part_file(parts, number, "npy"), allow_pickle=False)
        sizes[at : at + count] = lengths
        begins[at : at + count] = np.cumsum(lengths) - lengths
        at += int(count)
    chosen = _nonzero(sizes, result.folder / "chosen.tmp")
    np.random.default_rng(_SEED).shuffle(chosen)  # in place: what `permutation` returns
    columns = {name: _array(result.file(name), len(chosen)) for name in ("part", "start", "size", "end")}
    ends_of_parts, total = np.cumsum(counts), 0
    for i in range(0, len(chosen), _CHUNK):
        rows = chosen[i : i + _CHUNK]
        own = sizes[rows]
        columns["part"][i : i + _CHUNK] = first + np.searchsorted(ends_of_parts, rows, "right")
        columns["start"][i : i + _CHUNK] = begins[rows]
        columns["size"][i : i + _CHUNK] = own
        columns["end"][i : i + _CHUNK] = total + np.cumsum(own)
        total += int(own.sum())
    del sizes, begins, chosen, columns  # writes them
    for leftover in result.folder.glob("*.tmp"):
        leftover.unlink()
    atomic.write_text(result.done, "")


def _nonzero(sizes: np.ndarray, path: Path) -> np.ndarray:
    """Indices of the elements that are not 0, in a file."""
    chosen = _array(path, int(np.count_nonzero(sizes)))
    at = 0
    for i in range(0, len(sizes), _CHUNK):
        found = np.flatnonzero(sizes[i : i + _CHUNK]) + i
        chosen[at : at + len(found)] = found
        at += len(found)
    return chosen


def _count(parts: Path, number: int) -> int:
    return len(np.load(part_file(parts, number, "npy"), mmap_mode="r", allow_pickle=False))


def _array(path: Path, count: int) -> np.ndarray:
    """A new array of int64 in a file: the system may write its pages out instead of keeping them in memory."""
    if not count:  # which cannot be mapped
        with path.open("wb") as file:
            np.save(file, np.empty(0, np.int64))
        return np.empty(0, np.int64)
    return np.asarray(np.lib.format.open_memmap(path, "w+", np.int64, (count,)))


def segments(result: Order) -> list[tuple[int, int]]:
    """First document, and one after the last, of each segment."""
    ends = result.read("end")
    if not len(ends):
        return []
    edges = np.searchsorted(ends, np.arange(result.segment_tokens, int(ends[-1]), result.segment_tokens))
    bounds = sorted({0, *(int(edge) for edge in edges), len(ends)})
    return list(itertools.pairwise(bounds))


def gather(parts: Path, result: Order, number: int, first: int, last: int, dtype: np.dtype[Any]) -> None:
    """Write the tokens of documents `first` to `last` - 1 as segment `number`.

    Raises:
        DataError: a part is damaged.
    """
    owners, starts, sizes = (np.array(result.read(name)[first:last]) for name in ("part", "start", "size"))
    ends = np.cumsum(sizes)
    tokens = np.empty(int(ends[-1]), dtype)
    by_place = np.lexsort((starts, owners))
    open_part, source = -1, np.empty(0, dtype)
    for i in by_place:
        if owners[i] != open_part:
            open_part = int(owners[i])
            path = part_file(parts, open_part, "tokens")
            source = np.memmap(path, dtype, "r")
        document = source[starts[i] : starts[i] + sizes[i]]
        if len(document) != sizes[i]:
            raise DataError(f"{path} is damaged", f"delete {parts} and run the command again")
        tokens[ends[i] - sizes[i] : ends[i]] = document
    with atomic.replacement(result.segment(number)) as temporary, temporary.open("xb") as file:
        tokens.tofile(file)


def join(result: Order, count: int, bin_path: Path, idx_path: Path, dtype: np.dtype[Any]) -> tuple[int, int, str]:
    """Write the dataset of `count` segments.

    Returns:
        its documents and tokens, and the SHA-256 of the .bin file.
    """
    digest = hashlib.sha256()
    with bin_path.open("xb") as target:
        for number in range(count):
            with result.segment(number).open("rb") as source:
                while chunk := source.read(_COPY_BYTES):
                    target.write(chunk)
                    digest.update(chunk)
    sizes, ends = result.read("size"), result.read("end")
    _write_index(idx_path, sizes, ends, dtype)
    return len(sizes), int(ends[-1]) if len(ends) else 0, digest.hexdigest()


def _write_index(path: Path, sizes: np.ndarray, ends: np.ndarray, dtype: np.dtype[Any]) -> None:
    """As Megatron-Core's `IndexedDatasetBuilder` does, which keeps the whole index in lists of Python."""
    with path.open("xb") as file:
        file.write(HEADER.pack(MAGIC, 1, code_of(dtype), len(sizes), len(sizes) + 1))
        for i in range(0, len(sizes), _CHUNK):
            file.write(sizes[i : i + _CHUNK].astype(np.int32).tobytes())
        for i in range(0, len(sizes), _CHUNK):
            begins = ends[i : i + _CHUNK] - sizes[i : i + _CHUNK]
            file.write((begins * dtype.itemsize).astype(np.int64).tobytes())
        for i in range(0, len(sizes) + 1, _CHUNK):
            file.write(np.arange(i, min(i + _CHUNK, len(sizes) + 1), dtype=np.int64).tobytes())
