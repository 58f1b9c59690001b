"""moe-data as stages: read, find duplicates, tokenise, shuffle, write.

    files -> shards -> [read, filter, hash] -> tables of keys -> [find duplicates] -> rows to drop
          -> parts  -> [tokenise]           -> order -> [gather segments] -> .bin/.idx

What is in brackets runs in the workers of all ranks. A stage begins when the one before it has ended everywhere.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe_train.config.schema import DataConfig
from moe_train.data import corpus, duplicates, shuffle, stages
from moe_train.data.files import Source
from moe_train.data.manifest import PREFIX
from moe_train.data.progress import StageProgress
from moe_train.data.report import Report, lines
from moe_train.data.shards import CorpusShard, part_file, shard_bytes, shards_of
from moe_train.data.shuffle import Order
from moe_train.data.stages import PartResult, ShardResult, Tokenising
from moe_train.data.team import StageTask, Team
from moe_train.files import atomic, untrusted
from parallel.errors import DataError


@dataclass(frozen=True)
class WrittenPair:
    """One .bin/.idx pair.

    Attributes:
        prefix: of the files, in the directory of the dataset.
        sha256: of the .bin file.
    """

    prefix: str
    documents: int
    tokens: int
    sha256: str


class Pipeline:
    """The stages of one dataset, for one rank.

    Args:
        sources: texts, each of which becomes one .bin/.idx pair.
        parts: directory of intermediate files.
        tokenizer: tokenizer.json, which exists when `tokenise` is called.
        dtype: of a token.
        show: whether this rank shows progress.
    """

    def __init__(
        self, data: DataConfig, sources: Sequence[Source], team: Team, parts: Path, tokenizer: Path,
        dtype: np.dtype[Any], show: bool,
    ) -> None:  # fmt: skip
        self._data, self._sources, self._team, self._parts = data, sources, team, parts
        self._tokenizer, self._dtype, self._show = tokenizer, dtype, show
        self._memory = data.prepare_memory_mib * 2**20
        self._shards = shards_of(sources)
        self._piece = corpus.piece_characters([file for source in sources for file in source.files])
        self._tables = stages.tables_of(data)

    def run(self, report: Report) -> list[Order]:
        """All stages but the last; returns an order for each source.

        Args:
            report: is given the counts.

        Raises:
            DataError: the text is at fault, or there is none.
        """
        results = self._read()
        kept = sum(result.rows for result in results)
        partitions = self._find_duplicates(kept)
        self._tokenise(results, partitions)
        _count(report, self._shards, results, self._part_results(results))
        for number, source in enumerate(self._sources):
            rows = sum(r.rows for shard, r in zip(self._shards, results, strict=True) if shard.source == number)
            if not rows:
                name = f" of {source.name}" if source.name else ""
                told = "; ".join(lines(report.to_dict()))
                raise DataError(f"the corpus{name} has no text: {told}", "add text or correct data.path")
        return self._shuffle(results)

    def _stage(self, name: str, tasks: Sequence[StageTask], function: Any) -> None:
        with StageProgress(name, sum(task.size for task in tasks), self._show) as progress:
            self._team.run(tasks, function, progress)

    def _read(self) -> list[ShardResult]:
        (self._parts / "read").mkdir(exist_ok=True)
        size = shard_bytes(self._sources)
        tasks = [
            StageTask(
                stages.shard_file(self._parts, number, "json"),
                (self._parts, number, shard, self._sources[shard.source].data, self._piece, size), shard.size,
            )
            for number, shard in enumerate(self._shards)
        ]  # fmt: skip
        self._stage("reading", tasks, stages.read_shard)
        return list(stages.read_results(self._parts, len(self._shards)))

    def _find_duplicates(self, rows: int) -> int:
        """Returns the number of partitions of each table."""
        (self._parts / "duplicates").mkdir(exist_ok=True)
        partitions = duplicates.partitions_of(rows, self._memory)
        tasks = [
            StageTask(
                stages.duplicates_file(self._parts, table, partition, partitions),
                (self._parts, len(self._shards), self._tables, table, partition, partitions, self._memory),
                duplicates.BYTES_PER_ROW * rows // partitions,
            )
            for table in range(self._tables.count)
            for partition in range(partitions)
        ]
        self._stage("finding duplicates", tasks, stages.find_duplicates)
        return partitions

    def _tokenise(self, results: Sequence[ShardResult], partitions: int) -> None:
        common = Tokenising(self._parts, self._tokenizer, self._dtype, self._tables, partitions, self._piece)
        tasks = []
        row, number = 0, itertools.count()
        for shard_number, (shard, result) in enumerate(zip(self._shards, results, strict=True)):
            before, data = 0, self._sources[shard.source].data
            for part in result.parts:
                part_number = next(number)
                tasks.append(StageTask(
                    part_file(self._parts, part_number, "npy"),
                    (common, part_number, shard_number, shard, data, part, before, row), part.size,
                ))  # fmt: skip
                row += part.rows
                before += part.documents
        self._stage("tokenising", tasks, stages.tokenize_part)

    def _part_results(self, results: Sequence[ShardResult]) -> Iterator[PartResult]:
        for number in range(sum(len(result.parts) for result in results)):
            yield PartResult.from_record(untrusted.read_object(part_file(self._parts, number, "json")))

    def _shuffle(self, results: Sequence[ShardResult]) -> list[Order]:
        tokens = self._memory // (4 * self._dtype.itemsize)
        orders = [Order(self._parts / f"order{number}", tokens) for number in range(len(self._sources))]
        parts_of = [
            sum(len(r.parts) for shard, r in zip(self._shards, results, strict=True) if shard.source == number)
            for number in range(len(self._sources))
        ]
        ends = list(itertools.accumulate(parts_of))
        firsts = [end - count for end, count in zip(ends, parts_of, strict=True)]
        tasks = [
            StageTask(order.done, (self._parts, first, end, order))
            for order, first, end in zip(orders, firsts, ends, strict=True)
        ]
        self._stage("ordering", tasks, shuffle.order)
        tasks = [
            StageTask(
                order.segment(number), (self._parts, order, number, first, last, self._dtype),
                int(order.read("size")[first:last].sum()) * self._dtype.itemsize,
            )
            for order in orders
            for number, (first, last) in enumerate(shuffle.segments(order))
        ]  # fmt: skip
        self._stage("shuffling", tasks, shuffle.gather)
        return orders

    def write(self, orders: Sequence[Order], directory: Path) -> list[WrittenPair]:
        """The last stage, of one rank: the files of the dataset."""
        return [
            _write(source, order, directory, self._dtype) for source, order in zip(self._sources, orders, strict=True)
        ]

    def lineage(self) -> dict[str, Any]:
        """For the manifest: what became of each shard, in the order of the corpus."""
        results = list(stages.read_results(self._parts, len(self._shards)))
        found = self._part_results(results)
        shards = [
            _shard_lineage(self._sources, shard, result, [next(found) for _ in result.parts])
            for shard, result in zip(self._shards, results, strict=True)
        ]
        totals = []
        for source in self._sources:
            own = [shard for shard in shards if shard["source"] == source.name]
            counts = {key: sum(shard[key] for shard in own) for key in _COUNTS}
            totals.append({"name": source.name, "files": len(source.files), **counts})
        return {"sources": totals, "shards": shards}


_COUNTS = ("documents", "kept", "text_bytes", "tokens")


def _count(
    report: Report, shards: Sequence[CorpusShard], results: Sequence[ShardResult], parts: Iterator[PartResult]
) -> None:
    """Add what all shards and parts have counted, with places counted from the start of each file."""
    before: dict[str, int] = {}
    for shard, result in zip(shards, results, strict=True):
        report.include(result.report, before)
        for _ in result.parts:
            part = next(parts)
            report.include(part.report, before)
            report.kept -= sum(part.report.counts.values())
        file = str(shard.spans[0].file)
        before[file] = before.get(file, 0) + result.lines


def _shard_lineage(
    sources: Sequence[Source], shard: CorpusShard, result: ShardResult, parts: Sequence[PartResult]
) -> dict[str, Any]:
    first, last = shard.spans[0], shard.spans[-1]
    counts = dict(result.report.counts)
    for part in parts:
        for reason, count in part.report.counts.items():
            counts[reason] = counts.get(reason, 0) + count
    record: dict[str, Any] = {"source": sources[shard.source].name, "first_file": str(first.file)}
    if len(shard.spans) > 1:
        record |= {"last_file": str(last.file), "files": len(shard.spans)}
    if first.start or first.stop is not None:
        record["bytes"] = [first.start, first.file.stat().st_size if first.stop is None else first.stop]
    record |= {
        "documents": result.report.documents,
        "kept": sum(part.documents for part in parts),
        "text_bytes": sum(part.text_bytes for part in parts),
        "tokens": sum(part.tokens for part in parts),
        "left_out_or_changed": {reason.name.lower(): count for reason, count in counts.items()},
    }
    fallbacks = sum(part.fallback for part in parts)
    return record | ({"parts_not_by_gigatoken": fallbacks} if fallbacks else {})


def _write(source: Source, order: Order, directory: Path, dtype: np.dtype[Any]) -> WrittenPair:
    prefix = f"{source.name}/{PREFIX}" if source.name else PREFIX
    paths = [directory / f"{prefix}.{suffix}" for suffix in ("bin", "idx")]
    paths[0].parent.mkdir(exist_ok=True)
    for path in paths:
        atomic.remove_leftovers(path)  # as large as the dataset
        path.with_name(f"{path.name}.part").unlink(missing_ok=True)  # of an earlier version
    with atomic.replacement(paths[0]) as bin_path, atomic.replacement(paths[1]) as idx_path:
        count = len(shuffle.segments(order))
        documents, tokens, sha256 = shuffle.join(order, count, bin_path, idx_path, dtype)
    return WrittenPair(prefix, documents, tokens, sha256)
