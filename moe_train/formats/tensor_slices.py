"""Lazy reads of tensors in files: `FileRegion` locates a tensor's bytes, `TensorSlice` has rows of it in memory.

Reads use pread into the caller's memory. With mmap, touched pages count as memory of the process, and a conversion
touches all of them. Most conversions only move bytes, so torch, which takes a second to import, is imported
only for arithmetic.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from moe_train.files import untrusted
from moe_train.formats.dtypes import Dtype, of_torch
from parallel.errors import CheckpointError

if TYPE_CHECKING:
    import torch

BLOCK_BYTES = 1 << 19
"""Block size of reads, conversions and writes: it fits in a core's cache."""


@dataclass(frozen=True)
class TensorSlice:
    """Consecutive rows of a tensor, in memory."""

    dtype: Dtype
    shape: tuple[int, ...]
    data: memoryview
    """Their bytes, without gaps."""

    @staticmethod
    def empty(dtype: Dtype, shape: tuple[int, ...], out: memoryview | None = None) -> TensorSlice:
        """Memory for rows: the beginning of `out` where that is given."""
        size = prod(shape) * dtype.itemsize
        if out is None:
            out = memoryview(bytearray(size))
        return TensorSlice(dtype, shape, out if len(out) == size else out[:size])

    @staticmethod
    def of(tensor: torch.Tensor) -> TensorSlice:
        """A tensor's memory, or that of a copy where it is not contiguous."""
        import torch

        data: memoryview = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
        return TensorSlice(of_torch(tensor.dtype), tuple(tensor.shape), data)

    def tensor(self) -> torch.Tensor:
        """The same memory as a tensor."""
        import torch

        if not self.data:  # which torch refuses
            return torch.empty(self.shape, dtype=self.dtype.torch)
        return torch.frombuffer(self.data, dtype=self.dtype.torch).reshape(self.shape)

    def range(self, start: int, stop: int) -> TensorSlice:
        """Rows `start` to `stop`, in the same memory."""
        row = len(self.data) // max(1, self.shape[0])
        return TensorSlice(self.dtype, (stop - start, *self.shape[1:]), self.data[start * row : stop * row])


@dataclass(frozen=True)
class FileRegion:
    """The bytes of a C-contiguous tensor in a file."""

    path: Path
    offset: int
    dtype: Dtype
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, a slice of the first axis."""
        return prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def bytes(self) -> int:
        """Of the whole tensor."""
        return prod(self.shape) * self.dtype.itemsize

    def row_range(self, start: int, stop: int) -> FileRegion:
        """The tensor of rows `start` to `stop`."""
        return FileRegion(self.path, self.offset + start * self.row_bytes, self.dtype, (stop - start, *self.shape[1:]))

    def index(self, i: int) -> FileRegion:
        """The i-th slice of the first axis, without that axis."""
        return FileRegion(self.path, self.offset + i * self.row_bytes, self.dtype, self.shape[1:])

    def read(self, out: memoryview | None = None) -> TensorSlice:
        """The tensor, at the beginning of `out` where given.

        Raises:
            CheckpointError: the file is missing or ends too early.
        """
        rows = TensorSlice.empty(self.dtype, self.shape, out)
        view = rows.data
        try:
            descriptor = untrusted.open_regular(self.path)
        except OSError as error:
            raise CheckpointError(
                f"{self.path} cannot be read: {error.strerror}", "restore the file from a copy"
            ) from error
        try:
            done = 0
            while done < len(view):
                count = os.preadv(descriptor, [view[done:]], self.offset + done)
                if count == 0:
                    raise truncated(self.path, self.offset + len(view))
                done += count
        except OSError as error:
            raise CheckpointError(
                f"{self.path} cannot be read: {error.strerror}", "restore the file from a copy"
            ) from error
        finally:
            os.close(descriptor)
        return rows


def truncated(path: Path, needed: int) -> CheckpointError:
    """The error for a file that is shorter than its table of contents says."""
    size = path.stat().st_size
    return CheckpointError(
        f"{path} is cut off: it has {size:,} bytes of at least {needed:,}", "restore the file from a copy"
    )
