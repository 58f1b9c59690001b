"""Finds NaN and infinite numbers in tensors that are being moved, at the speed of memory. No torch import.

In every IEEE format a number is not finite where its exponent has all bits set, and these are the largest patterns of
either sign. Two reductions over the bytes as whole numbers therefore tell whether there is one.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from moe_train.files import untrusted
from moe_train.formats.dtypes import Dtype
from moe_train.formats.manifest import Entry
from moe_train.formats.tensor_slices import FileRegion, TensorSlice
from parallel.errors import CheckpointError

_INFINITE = {
    "float64": 0x7FF0 << 48, "float32": 0x7F80 << 16, "bfloat16": 0x7F80, "float16": 0x7C00, "float8_e5m2": 0x7C,
    "float8_e4m3fn": 0x7E,  # its largest number: there are no infinite ones
}  # fmt: skip
"""Format -> bits of plus infinity. What is above is NaN."""

_SCALE = "float8_e8m0fnu"  # an exponent without a sign; 255 is NaN
_BLOCK_BYTES = 1 << 22
_SHOWN = 5


@dataclass(frozen=True)
class Count:
    """Of a tensor."""

    nan: int = 0
    infinite: int = 0

    def __add__(self, other: Count) -> Count:
        return Count(self.nan + other.nan, self.infinite + other.infinite)

    def __bool__(self) -> bool:
        return bool(self.nan or self.infinite)

    def __str__(self) -> str:
        parts = [f"{self.nan:,} NaN"] * bool(self.nan) + [f"{self.infinite:,} infinite numbers"] * bool(self.infinite)
        return " and ".join(parts)


_NONE = Count()


def count(dtype: Dtype, data: memoryview) -> Count:
    """The numbers in `data`, without gaps, that are not finite."""
    if dtype.name == _SCALE:
        return Count(nan=int(np.count_nonzero(np.frombuffer(data, np.uint8) == 0xFF)))
    infinite = _INFINITE.get(dtype.name)
    if infinite is None or not len(data):
        return _NONE
    sign = 1 << 8 * dtype.itemsize - 1
    limit = infinite + (dtype.name == "float8_e4m3fn")
    bits = np.frombuffer(data, f"u{dtype.itemsize}")
    if bits.view(f"i{dtype.itemsize}").max() < limit and bits.max() < sign + limit:
        return _NONE
    magnitude = bits & bits.dtype.type(sign - 1)
    infinities = int(np.count_nonzero(magnitude == infinite)) if limit == infinite else 0
    return Count(int(np.count_nonzero(magnitude > infinite)), infinities)


@dataclass
class Tally:
    """What is found in the tensors of one file, or of a checkpoint."""

    found: dict[str, Count] = field(default_factory=dict)
    """Tensor -> its numbers that are not finite, where it has any."""

    def add(self, name: str, rows: TensorSlice) -> TensorSlice:
        """Count `rows` of the tensor `name` and return them."""
        if counted := count(rows.dtype, rows.data):
            self.found[name] = self.found.get(name, _NONE) + counted
        return rows

    def checked(self, name: str, blocks: Iterable[TensorSlice]) -> Iterator[TensorSlice]:
        """The `blocks` of a tensor, whose non-finite values are counted while they are yielded."""
        return (self.add(name, rows) for rows in blocks)

    def merge(self, other: dict[str, Count]) -> None:
        """Add what was found elsewhere."""
        for name, counted in other.items():
            self.found[name] = self.found.get(name, _NONE) + counted

    def __str__(self) -> str:
        shown = [f"{name} has {counted}" for name, counted in list(self.found.items())[:_SHOWN]]
        more = len(self.found) - len(shown)
        return ", ".join(shown) + (f", and {more:,} more tensors have some" if more else "")

    def refuse(self, where: str, remedy: str) -> None:
        """Raise CheckpointError where something was found."""
        if self.found:
            raise CheckpointError(f"{where}: {self}", f"restore the weights from a copy, or {remedy}")


Places = Sequence[tuple[str, FileRegion]]
"""(tensor, where its numbers are) in one file. They do not overlap."""


def entry_of(path: Path, places: Places) -> tuple[Entry, Tally]:
    """Size and digest of a file, and the numbers of its tensors that are not finite, in one reading."""
    digest, tally, block = hashlib.sha256(), Tally(), memoryview(bytearray(_BLOCK_BYTES))
    descriptor, position = untrusted.open_regular(path), 0
    try:
        for name, extent in [*sorted(places, key=lambda place: place[1].offset), ("", None)]:
            end = None if extent is None else extent.offset
            for data in _read(descriptor, position, end, block):  # what is between tensors
                digest.update(data)
                position += len(data)
            if extent is None or position != extent.offset:
                break
            for data in _read(descriptor, position, position + extent.bytes, block):
                digest.update(data)
                position += len(data)
                if counted := count(extent.dtype, data[: len(data) // extent.dtype.itemsize * extent.dtype.itemsize]):
                    tally.found[name] = tally.found.get(name, _NONE) + counted
    finally:
        os.close(descriptor)
    return Entry(position, digest.hexdigest()), tally


def _read(descriptor: int, start: int, end: int | None, block: memoryview) -> Iterator[memoryview]:
    """The bytes of a file from `start` to `end`, or to its end, a whole block at a time."""
    while end is None or start < end:
        wanted = len(block) if end is None else min(len(block), end - start)
        filled = 0
        while filled < wanted and (size := os.preadv(descriptor, [block[filled:wanted]], start + filled)):
            filled += size
        if filled:
            yield block[:filled]
        start += filled
        if filled < wanted:
            return
