"""Tensors in files, read by rows: `Extent` says where a tensor's bytes are, and nothing is read before it is wanted.

Reading goes through pread into memory of the caller. A mapped file would count every page that was touched as memory of
the process, and a conversion touches all of them.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from parallel.errors import CheckpointError

BLOCK_BYTES = 1 << 19
"""Read, converted and written at once: it stays in a core's cache on its way."""


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    view: memoryview = tensor.reshape(-1).view(torch.uint8).numpy().data
    return view


@dataclass(frozen=True)
class Extent:
    """A C-contiguous tensor in a file."""

    path: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, a slice of the first axis."""
        return prod(self.shape[1:]) * self.dtype.itemsize

    def row_range(self, start: int, stop: int) -> Extent:
        """The tensor of rows `start` to `stop`."""
        return Extent(self.path, self.offset + start * self.row_bytes, self.dtype, (stop - start, *self.shape[1:]))

    def index(self, i: int) -> Extent:
        """The i-th slice of the first axis, without that axis."""
        return Extent(self.path, self.offset + i * self.row_bytes, self.dtype, self.shape[1:])

    def read(self, out: Tensor | None = None) -> Tensor:
        """The tensor, in `out` (contiguous, same dtype and size) where given.

        Raises:
            CheckpointError: the file is missing or ends too early.
        """
        target = torch.empty(self.shape, dtype=self.dtype) if out is None else out
        view = bytes_of(target)
        try:
            descriptor = os.open(self.path, os.O_RDONLY)
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
        return target


def truncated(path: Path, needed: int) -> CheckpointError:
    """The error for a file that is shorter than its table of contents says."""
    size = path.stat().st_size
    return CheckpointError(
        f"{path} is cut off: it has {size:,} bytes of at least {needed:,}", "restore the file from a copy"
    )
