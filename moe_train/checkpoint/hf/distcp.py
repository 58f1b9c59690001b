"""Tensors in a Megatron checkpoint (`torch_dist` format), read and written by rows, without process groups.

A `.distcp` file is a row of items, each one chunk of one tensor as torch.save writes it; `.metadata` says which chunk
stands where (torch/distributed/checkpoint/{filesystem,metadata}.py).
"""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from moe_train.checkpoint import metadata
from moe_train.checkpoint.directory import METADATA, damaged
from moe_train.checkpoint.hf.rows import Extent

_LOCAL_HEADER = 30  # bytes of a zip entry's own header before its name (APPNOTE.TXT, 4.3.7)


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor: where it begins, its shape, and the item that holds it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: Path
    start: int
    length: int

    @cached_property
    def extent(self) -> Extent:
        """Where its numbers are. Reads the item's table of contents; the numbers must lie there in one piece."""
        with self.file.open("rb") as file:
            window = _Window(file, self.start, self.length)
            try:
                tensor = torch.load(cast(IO[bytes], window), map_location="meta", weights_only=True)
                with zipfile.ZipFile(window) as archive:
                    entry = next(e for e in archive.infolist() if e.filename.split("/", 1)[-1] == "data/0")
                window.seek(entry.header_offset + 26)
                name, extra = (int.from_bytes(window.read(2), "little") for _ in range(2))
            except Exception as error:  # a damaged zip or pickle raises nearly anything
                raise damaged(
                    self.file.parent, f"an item of {self.file.name} cannot be read: {type(error).__name__}: {error}"
                ) from error
        if not tensor.is_contiguous() or tuple(tensor.shape) != self.sizes or entry.compress_type != zipfile.ZIP_STORED:
            raise damaged(self.file.parent, f"an item of {self.file.name} is not what its table of contents says")
        data = self.start + entry.header_offset + _LOCAL_HEADER + name + extra
        return Extent(self.file, data + tensor.storage_offset() * tensor.element_size(), tensor.dtype, self.sizes)


class _Window(io.RawIOBase):
    """A part of a file as a file of its own."""

    def __init__(self, file: io.BufferedReader, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._start + self._at)
        count = self._file.readinto(memoryview(buffer)[: max(0, self._length - self._at)])
        self._at += count
        return count


class Checkpoint:
    """A Megatron checkpoint, for reading."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.contents: Metadata = metadata.read(directory)
        self.tensors: dict[str, TensorStorageMetadata] = {
            key: entry
            for key, entry in self.contents.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self._chunks: dict[str, list[Chunk]] = {}

    def chunks(self, key: str) -> list[Chunk]:
        """Every chunk of a tensor."""
        if key not in self._chunks:
            self._chunks[key] = [self._chunk(key, chunk) for chunk in self.tensors[key].chunks]
        return self._chunks[key]

    def _chunk(self, key: str, chunk: ChunkStorageMetadata) -> Chunk:
        place: _StorageInfo = self.contents.storage_data[MetadataIndex(key, chunk.offsets)]
        file = self.directory / place.relative_path
        return Chunk(tuple(chunk.offsets), tuple(chunk.sizes), file, place.offset, place.length)

    def read(self, key: str, index: int | None, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of a tensor, or of its `index`-th slice on the first axis.

        Raises:
            CheckpointError: an item is damaged, or a part of the rows is in no chunk.
        """
        shape = tuple(self.tensors[key].size)
        rows = shape if index is None else shape[1:]
        out = torch.empty((stop - start, *rows[1:]), dtype=self.tensors[key].properties.dtype)
        filled = 0
        for chunk in self.chunks(key):
            box = chunk.offsets, chunk.sizes
            if index is not None:
                if not box[0][0] <= index < box[0][0] + box[1][0]:
                    continue
                box = box[0][1:], box[1][1:]
            first, last = max(start, box[0][0]), min(stop, box[0][0] + box[1][0])
            if first >= last:
                continue
            extent = chunk.extent if index is None else chunk.extent.index(index - chunk.offsets[0])
            part = extent.row_range(first - box[0][0], last - box[0][0])
            target = out[first - start : last - start]
            for axis, (offset, size) in enumerate(zip(box[0][1:], box[1][1:], strict=True), 1):
                target = target.narrow(axis, offset, size)
            if target.is_contiguous() and target.dtype == part.dtype:
                part.read(target)
            else:
                target.copy_(part.read())
            filled += target.numel()
        if filled != out.numel():
            raise damaged(self.directory, f"{out.numel() - filled:,} elements of {key} are in no file")
        return out


@dataclass(frozen=True)
class Item:
    """A chunk that was written: of which tensor, where in it, and where in which file."""

    key: str
    global_shape: tuple[int, ...]
    dtype: torch.dtype
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


def table(items: Iterable[Item]) -> bytes:
    """`.metadata` of a checkpoint that holds `items`."""
    tensors: dict[str, TensorStorageMetadata] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for item in items:
        if item.key not in tensors:
            properties = TensorProperties(dtype=item.dtype)
            tensors[item.key] = TensorStorageMetadata(properties, torch.Size(item.global_shape), [])
        offsets = torch.Size(item.offsets)
        tensors[item.key].chunks.append(ChunkStorageMetadata(offsets, torch.Size(item.sizes)))
        storage[MetadataIndex(item.key, offsets)] = _StorageInfo(item.file, item.start, item.length)
    return pickle.dumps(Metadata(state_dict_metadata=dict(tensors), storage_data=storage))


__all__ = ["METADATA", "Checkpoint", "Chunk", "Item", "table"]
