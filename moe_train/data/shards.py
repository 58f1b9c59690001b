"""How a corpus is cut: shards, which are read at once, and parts, which are tokenised at once.

Both depend on the names and sizes of the files alone, so any number of processes gets the same ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_train.data.files import PLAIN_TEXT, Source
from moe_train.data.readers import FileSpan

_SHARDS = 1024
_SMALLEST_SHARD_BYTES, _LARGEST_SHARD_BYTES = 2**20, 2**28


@dataclass(frozen=True)
class CorpusShard:
    """Files, or a range of the lines of one, that one process reads.

    Attributes:
        source: number of the `Source`.
        size: bytes of the files.
    """

    source: int
    spans: tuple[FileSpan, ...]
    size: int


@dataclass(frozen=True)
class CorpusPart:
    """What one process tokenises: a shard, or a range of the documents of one.

    Attributes:
        start, stop: bytes of the only span of the shard; 0 and None mean the bounds of the shard.
        documents: that are read from it, of which the filters keep `rows`.
        lines: of the shard that are before it.
        size: bytes, for the progress.
    """

    start: int
    stop: int | None
    documents: int
    rows: int
    lines: int
    size: int


def part_file(parts: Path, number: int, suffix: str) -> Path:
    """A file of part `number`: tokens, json, or npy with the lengths of its documents."""
    return parts / f"{number:06d}.{suffix}"


def shard_bytes(sources: Sequence[Source]) -> int:
    """Bytes of a shard."""
    total = sum(file.stat().st_size for source in sources for file in source.files)
    return min(max(total // _SHARDS, _SMALLEST_SHARD_BYTES), _LARGEST_SHARD_BYTES)


def shards_of(sources: Sequence[Source]) -> list[CorpusShard]:
    """The shards of a corpus, in its order: large jsonl files in ranges, small files together."""
    target = shard_bytes(sources)
    return [shard for number, source in enumerate(sources) for shard in _of_source(number, source, target)]


def _of_source(number: int, source: Source, target: int) -> Iterator[CorpusShard]:
    group: list[FileSpan] = []
    size = 0
    for file in source.files:
        file_bytes = file.stat().st_size
        ranges = file_bytes // target if file.name.endswith(".jsonl") else 1
        if group and (ranges > 1 or size + file_bytes > target):
            yield CorpusShard(number, tuple(group), size)
            group, size = [], 0
        if ranges > 1:
            yield from _ranges(number, file, file_bytes, ranges)
        else:
            group.append(FileSpan(file))
            size += file_bytes
    if group:
        yield CorpusShard(number, tuple(group), size)


def _ranges(number: int, file: Path, file_bytes: int, count: int) -> Iterator[CorpusShard]:
    edges = [file_bytes * i // count for i in range(count + 1)]
    for i, (start, stop) in enumerate(itertools.pairwise(edges)):
        yield CorpusShard(number, (FileSpan(file, start, None if i == count - 1 else stop),), stop - start)


def is_divisible(shard: CorpusShard) -> bool:
    """Whether a reader can begin inside of the shard: it is one plain text file."""
    return len(shard.spans) == 1 and shard.spans[0].file.name.endswith(PLAIN_TEXT)


def spans_of(shard: CorpusShard, part: CorpusPart) -> tuple[FileSpan, ...]:
    """What is read for a part of the shard."""
    if part.start == 0 and part.stop is None:
        return shard.spans
    (span,) = shard.spans
    return (FileSpan(span.file, part.start or span.start, span.stop if part.stop is None else part.stop),)
