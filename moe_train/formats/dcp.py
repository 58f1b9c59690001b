"""Tensors in a Megatron checkpoint (`torch_dist` format), read and written by rows, without process groups.

A `.distcp` file is a row of items, each one chunk of one tensor as torch.save writes it; `.metadata` says which file
has which chunk (torch/distributed/checkpoint/{filesystem,metadata}.py). torch.save would need the whole item in memory,
so items are written here, with `zipfile`, a few rows at a time.
"""

from __future__ import annotations

import bisect
import io
import os
import pickle
import sys
import threading
import zipfile
import zlib
from collections import OrderedDict, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO, Protocol, cast

from moe_train.files import untrusted
from moe_train.formats import dcp_metadata, torch_item
from moe_train.formats.dtypes import DTYPES, Dtype
from moe_train.formats.run_directory import METADATA, damaged
from moe_train.formats.tensor_slices import BLOCK_BYTES, FileRegion, TensorSlice

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

_LOCAL_HEADER = 30  # bytes of a zip entry's own header before its name (APPNOTE.TXT, 4.3.7)
_LARGEST_TABLE_BYTES = 1 << 18
"""Read of an item before its numbers. What torch.save writes has less than 2 KB."""


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor: where it begins, its shape, and the item that holds it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    dtype: Dtype
    file: Path
    start: int
    length: int

    @property
    def extent(self) -> FileRegion:
        """Where its numbers are."""
        return self._located[0]

    @property
    def bytes(self) -> int:
        """Of its numbers."""
        return self.extent.bytes

    def check(self) -> None:
        """Raise CheckpointError where its numbers are not those that were written, by the checksum next to them."""
        checksum, flat = 0, FileRegion(self.file, self.extent.offset, DTYPES["uint8"], (self.bytes,))
        block = memoryview(bytearray(min(BLOCK_BYTES, self.bytes)))
        for start in range(0, self.bytes, BLOCK_BYTES):
            part = flat.row_range(start, min(start + BLOCK_BYTES, self.bytes))
            checksum = zlib.crc32(part.read(block).data, checksum)
        self.compare(checksum)

    def compare(self, checksum: int) -> None:
        """Raise CheckpointError where the CRC-32 of all its numbers differs from that next to them."""
        if checksum != self._located[1]:
            raise damaged(self.file.parent, f"the bytes of an item of {self.file.name} are not those that were written")

    @cached_property
    def _located(self) -> tuple[FileRegion, int]:
        """Where its numbers are, and their CRC-32. Reads the item's table of contents; they must lie in one piece."""
        try:
            with untrusted.open_binary(self.file) as file:
                dtype, entry, data = self._opened(_Window(file, self.start, self.length))
        except Exception as error:  # a damaged zip or pickle raises nearly anything
            raise damaged(
                self.file.parent, f"an item of {self.file.name} cannot be read: {type(error).__name__}: {error}"
            ) from error
        if dtype is None or entry.file_size != prod(self.sizes) * dtype.itemsize:
            raise damaged(self.file.parent, f"an item of {self.file.name} is not what its table of contents says")
        if not 0 <= data <= self.length - entry.file_size:
            raise damaged(self.file.parent, f"an item of {self.file.name} is cut off")
        return FileRegion(self.file, self.start + data, dtype, self.sizes), entry.CRC

    def _opened(self, window: _Window) -> tuple[Dtype | None, zipfile.ZipInfo, int]:
        """Format of the numbers (None where they are not these rows in one piece), their entry, where they begin."""
        with zipfile.ZipFile(window) as archive:
            entries = {entry.filename.split("/", 1)[-1]: entry for entry in archive.infolist()}
            for entry in entries.values():
                if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
                    raise ValueError(f"{entry.filename} is compressed, and torch.save compresses nothing")
            pickled_tensor = archive.read(entries["data.pkl"])  # `window` bounds it
            order = archive.read(entries["byteorder"]).decode() if "byteorder" in entries else sys.byteorder
        if order != sys.byteorder:
            raise ValueError(f"its numbers are in {order} endian order")
        numbers = entries["data/0"]
        dtype: Dtype | None = self.dtype
        if pickled_tensor != _pickled(self.dtype, self.sizes):
            description = torch_item.described(pickled_tensor)
            fits = description.is_whole and description.shape == self.sizes and description.bytes == numbers.file_size
            dtype = description.dtype if fits else None
        window.seek(numbers.header_offset + _LOCAL_HEADER - 4)
        name, extra = (int.from_bytes(window.read(2), "little") for _ in range(2))
        return dtype, numbers, numbers.header_offset + _LOCAL_HEADER + name + extra


class _Window(io.RawIOBase):
    """A part of a file as a file of its own, of which a table of contents is read and not more."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0
        self._left = _LARGEST_TABLE_BYTES

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._length - self._at)
        size = left if size < 0 else min(size, left)
        self._left -= size
        if self._left < 0:
            raise ValueError("its table of contents is too large")
        self._file.seek(self._start + self._at)
        data = self._file.read(size)
        self._at += len(data)
        return data


class Checks:
    """Compares chunks with their checksums while they are read, in any order. Each thread calls `settle` when it has
    finished reading.
    """

    def __init__(self) -> None:
        self._begun, self._checked = threading.local(), set[int]()

    @property
    def _of_thread(self) -> dict[int, tuple[Chunk, int, int]]:
        """Chunks that have been read from their start to some byte, and the CRC-32 so far."""
        begun: dict[int, tuple[Chunk, int, int]] = self._begun.__dict__.setdefault("chunks", {})
        return begun

    def read(self, chunk: Chunk, part: FileRegion, out: memoryview | None = None) -> TensorSlice:
        """`part` of `chunk`.

        Raises:
            CheckpointError: the chunk is damaged.
        """
        rows = part.read(out)
        if id(chunk) in self._checked:
            return rows
        _, position, checksum = self._of_thread.pop(id(chunk), (chunk, 0, 0))
        if part.offset - chunk.extent.offset != position:  # its rows are taken in another order
            self._check(chunk)
            return rows
        position, checksum = position + len(rows.data), zlib.crc32(rows.data, checksum)
        if position == chunk.bytes:
            chunk.compare(checksum)
            self._checked.add(id(chunk))
        else:
            self._of_thread[id(chunk)] = chunk, position, checksum
        return rows

    def settle(self) -> None:
        """Check also the chunks of which this thread has read the beginning only."""
        for chunk, _, _ in self._of_thread.values():
            self._check(chunk)
        self._of_thread.clear()

    def _check(self, chunk: Chunk) -> None:
        chunk.check()
        self._checked.add(id(chunk))


class Checkpoint:
    """A Megatron checkpoint, for reading. `checks` compare what is read with its checksums.

    Args:
        contents: its table of contents, where that has been read already.
    """

    def __init__(
        self, directory: Path, checks: Checks | None = None, contents: dcp_metadata.Metadata | None = None
    ) -> None:
        self.directory, self.checks = directory, checks
        self.contents = contents or dcp_metadata.read(directory)
        self.tensors: dict[str, dcp_metadata.TensorStorageMetadata] = {
            key: entry
            for key, entry in self.contents.state_dict_metadata.items()
            if isinstance(entry, dcp_metadata.TensorStorageMetadata)
        }
        self._chunks: dict[str, list[Chunk]] = {}
        self._ordered: dict[str, tuple[list[Chunk], int]] = {}
        """Chunks in the order of their places on the first axis, and the size of the longest there."""

    @property
    def files(self) -> set[Path]:
        """Files that hold tensors."""
        return {self.directory / place.relative_path for place in self.contents.storage_data.values()}

    @property
    def numbers(self) -> int:
        """How many are stored."""
        return sum(prod(entry.size) for entry in self.tensors.values())

    def master(self, key: str) -> str:
        """Name of the fp32 weights of the parameter `key`, or `key` where the checkpoint has none."""
        name = f"optimizer.state.fp32_param.{key}"
        return name if name in self.tensors else key

    def average(self, key: str) -> str:
        """Name of the EMA of the parameter `key`, or `key` where the checkpoint has none, as for a buffer."""
        name = dcp_metadata.EMA_PREFIX + key
        return name if name in self.tensors else key

    def chunks(self, key: str) -> list[Chunk]:
        """Every chunk of a tensor."""
        chunks_of_key = self._chunks.get(key)
        if chunks_of_key is None:  # a chunk is known to be checked by its identity, so all threads must have the same
            chunks_of_key = self._chunks.setdefault(
                key, [self._chunk(key, chunk) for chunk in self.tensors[key].chunks]
            )
        return chunks_of_key

    def _holding(self, key: str, index: int) -> list[Chunk]:
        """Chunks with a part of the `index`-th slice on the first axis."""
        if key not in self._ordered:
            chunks = sorted(self.chunks(key), key=_first)
            self._ordered[key] = chunks, max((chunk.sizes[0] for chunk in chunks), default=0)
        chunks, longest = self._ordered[key]
        # By the ends of chunks, not by their rows: a table of contents can name any number of rows.
        start = bisect.bisect_right(chunks, index - longest, key=_first)
        stop = bisect.bisect_right(chunks, index, key=_first)
        return [chunk for chunk in chunks[start:stop] if index < chunk.offsets[0] + chunk.sizes[0]]

    def _chunk(self, key: str, chunk: dcp_metadata.ChunkStorageMetadata) -> Chunk:
        place = self.contents.storage_data[dcp_metadata.MetadataIndex(key, chunk.offsets)]
        file, dtype = self.directory / place.relative_path, self.tensors[key].properties.dtype
        return Chunk(tuple(chunk.offsets), tuple(chunk.sizes), dtype, file, place.offset, place.length)

    def check_items(self, wanted: Iterable[ShardedTensor]) -> None:
        """Look at the items that hold a part of a `wanted` shard, and not at their numbers.

        Raises:
            CheckpointError: one is compressed, cut off, or not what the table of contents says.
        """
        for shard in wanted:
            sizes = (1,) * shard.prepend_axis_num + tuple(shard.local_shape)
            for chunk in self.chunks(shard.key):
                if all(
                    start < offset + size and offset < start + length
                    for start, length, offset, size in zip(
                        shard.global_offset, sizes, chunk.offsets, chunk.sizes, strict=True
                    )
                ):
                    _ = chunk.extent

    def read_part(self, chunk: Chunk, part: FileRegion, out: memoryview | None = None) -> TensorSlice:
        """A part of a chunk, read into `out` where given."""
        return self.checks.read(chunk, part, out) if self.checks else part.read(out)

    def read(self, key: str, index: int | None, start: int, stop: int, out: memoryview | None = None) -> TensorSlice:
        """Rows `start` to `stop` of a tensor, or of its `index`-th slice on the first axis; in `out` where given.

        Raises:
            CheckpointError: an item is damaged, or a part of the rows is in no chunk.
        """
        shape = tuple(self.tensors[key].size)
        rows = shape if index is None else shape[1:]
        whole = TensorSlice.empty(self.tensors[key].properties.dtype, (stop - start, *rows[1:]), out)
        filled = 0
        for chunk in self.chunks(key) if index is None else self._holding(key, index):
            box = chunk.offsets, chunk.sizes
            if index is not None:
                box = box[0][1:], box[1][1:]
            first, last = max(start, box[0][0]), min(stop, box[0][0] + box[1][0])
            if first >= last:
                continue
            extent = chunk.extent if index is None else chunk.extent.index(index - chunk.offsets[0])
            part = extent.row_range(first - box[0][0], last - box[0][0])
            target = whole.range(first - start, last - start)
            if part.shape == target.shape and part.dtype == target.dtype:
                self.read_part(chunk, part, target.data)
            else:
                _put(self.read_part(chunk, part), target, box[0][1:])
            filled += prod(part.shape)
        if filled != prod(whole.shape):
            raise damaged(self.directory, f"{prod(whole.shape) - filled:,} elements of {key} are in no file")
        return whole


def _first(chunk: Chunk) -> int:
    """Where a chunk begins on the first axis."""
    return chunk.offsets[0]


def _put(rows: TensorSlice, target: TensorSlice, offsets: tuple[int, ...]) -> None:
    """Copy a box into `target`, where it begins at `offsets` on the axes after the first."""
    place = target.tensor()
    for axis, (offset, size) in enumerate(zip(offsets, rows.shape[1:], strict=True), 1):
        place = place.narrow(axis, offset, size)
    place.copy_(rows.tensor())


class _Output(Protocol):
    position: int

    def write(self, data: Any, /) -> int: ...


def _empty() -> bytes:
    """torch.save({})."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(zipfile.ZipInfo("archive/data.pkl"), pickle.dumps({}, protocol=2))
        archive.writestr(zipfile.ZipInfo("archive/byteorder"), sys.byteorder)
        archive.writestr(zipfile.ZipInfo("archive/version"), "3\n")
    return buffer.getvalue()


EMPTY = _empty()


def write_item(out: _Output, dtype: Dtype, shape: tuple[int, ...], blocks: Iterable[TensorSlice]) -> None:
    """Append a tensor of `shape` as torch.save writes it, from `blocks` of its rows."""
    with zipfile.ZipFile(cast(IO[bytes], _WriteOnlyStream(out)), "w") as archive:
        archive.writestr(zipfile.ZipInfo("archive/data.pkl"), _pickled(dtype, shape))
        archive.writestr(zipfile.ZipInfo("archive/byteorder"), sys.byteorder)
        numbers = zipfile.ZipInfo("archive/data/0")
        with archive.open(numbers, "w", force_zip64=prod(shape) * dtype.itemsize >= zipfile.ZIP64_LIMIT) as data:
            for block in blocks:
                data.write(block.data)
        archive.writestr(zipfile.ZipInfo("archive/version"), "3\n")


class _WriteOnlyStream:
    """What `zipfile` needs of a file that is written from start to end: no way to seek, and nothing to flush."""

    def __init__(self, out: _Output) -> None:
        self.write = out.write

    def flush(self) -> None: ...


class _Storage:
    """Stands for the numbers of a tensor in a pickle, and for their class in torch."""

    def __init__(self, count: int) -> None:
        self.reference = ("storage", _Storage, "0", "cpu", count)


def _rebuild_tensor_v2() -> None:
    """Stands for the function of torch._utils."""


class _Described:
    """Pickles as a contiguous tensor does (torch/_tensor.py, `_reduce_ex_internal`), without one."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        strides = tuple(prod(max(1, n) for n in shape[axis + 1 :]) for axis in range(len(shape)))
        hooks: OrderedDict[str, Any] = OrderedDict()
        self._arguments = (_Storage(prod(shape)), 0, shape, strides, False, hooks)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild_tensor_v2, self._arguments


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        return obj.reference if isinstance(obj, _Storage) else None


@lru_cache(maxsize=1024)
def _pickled(dtype: Dtype, shape: tuple[int, ...]) -> bytes:
    """`data.pkl` of a contiguous tensor, as torch.save writes it."""
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=2).dump(_Described(shape))
    storage = torch_item.STORAGES[dtype.name]
    names = {("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor_v2, ("torch", storage): _Storage}
    return dcp_metadata.renamed(buffer.getvalue(), names)


@dataclass(frozen=True)
class Item:
    """A chunk that was written: of which tensor, where in it, and where in which file."""

    key: str
    global_shape: tuple[int, ...]
    dtype: Dtype
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


def table(items: Iterable[Item]) -> bytes:
    """`.metadata` of a checkpoint that holds `items`."""
    tensors: dict[str, dcp_metadata.TensorStorageMetadata | dcp_metadata.Other] = {}
    storage: dict[dcp_metadata.MetadataIndex, dcp_metadata.StorageInfo] = {}
    chunks = defaultdict[str, list[dcp_metadata.ChunkStorageMetadata]](list)
    for item in items:
        offsets, chunks_of_key = dcp_metadata.Size(item.offsets), chunks[item.key]
        if not chunks_of_key:
            properties = dcp_metadata.TensorProperties(item.dtype)
            tensors[item.key] = dcp_metadata.TensorStorageMetadata(
                properties, dcp_metadata.Size(item.global_shape), chunks_of_key
            )
        chunks_of_key.append(dcp_metadata.ChunkStorageMetadata(offsets, dcp_metadata.Size(item.sizes)))
        storage[dcp_metadata.MetadataIndex(item.key, offsets)] = dcp_metadata.StorageInfo(
            item.file, item.start, item.length
        )
    return dcp_metadata.dump(dcp_metadata.Metadata(tensors, storage))


__all__ = ["METADATA", "Checkpoint", "Checks", "Chunk", "Item", "table", "write_item"]
