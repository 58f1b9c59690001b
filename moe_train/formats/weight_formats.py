"""Formats of quantised weights: the tensors that a weight [out, in] is stored as, and the way to them and back.

`FORMATS` has a row for each value of `convert.dtype` that quantises. What config.json says of a format is in
moe_train/conversion/hf/quantization.py. torch is imported only where numbers are computed.
"""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moe_train.formats import block_fp8, mxfp4, packed_int
from moe_train.formats.dtypes import DTYPES, Dtype

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]

BF16, FP32 = DTYPES["bfloat16"], DTYPES["float32"]
PACKED, SCALE, SHAPE = "_packed", "_scale", "_shape"
ZERO_POINT, GROUP_INDEX = "_zero_point", "_g_idx"
"""Tensors of asymmetric and of reordered weights, which no format here has."""


@dataclass(frozen=True)
class StoredTensor:
    """One of the tensors of a quantised weight."""

    suffix: str
    """After the name of the weight, which ends with `weight`."""
    dtype: Dtype
    shape: Shape
    weight_rows: int = 1
    """Rows of the weight for each row of this tensor."""
    constant: bytes | None = None
    """Its content where that follows from the shape."""


class WeightFormat(ABC):
    """How the weight of a linear layer is stored."""

    name: str
    """Value of `convert.dtype`."""
    block_rows: int = 1
    """Rows that are quantised together."""
    nan: bool = False
    """Whether it can hold NaN."""

    @abstractmethod
    def stored(self, shape: Shape) -> tuple[StoredTensor, ...]:
        """The tensors of a weight [out, in]: first the one with its numbers, then the others."""

    @abstractmethod
    def quantise(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Rows of `stored` without the constants, from rows [n, in] that begin with a multiple of `block_rows`."""

    @abstractmethod
    def dequantise(self, parts: Sequence[Tensor], columns: int, first_row: int) -> Tensor:
        """Rows [n, columns] in bf16 from rows of `stored`, of which the first has the row `first_row` at its top."""

    @property
    def group(self) -> int | None:
        """Inputs that share a scale, where there must be whole groups."""
        return None

    @property
    def text(self) -> str:
        """For a reader."""
        return self.name

    def bits(self, shape: Shape) -> float:
        """Stored bits for each number of a weight [out, in]."""
        stored = sum(t.dtype.itemsize * _numel(t.shape) for t in self.stored(shape))
        return 8 * stored / max(1, _numel(shape))


def _numel(shape: Shape) -> int:
    result = 1
    for size in shape:
        result *= size
    return result


@dataclass(frozen=True)
class BlockFp8(WeightFormat):
    """float8_e4m3fn with a scale for each 128 x 128 block: `fp8` of transformers and vLLM."""

    power_of_two: bool = True
    name = "fp8"
    block_rows = block_fp8.BLOCK
    nan = True

    def stored(self, shape: Shape) -> tuple[StoredTensor, ...]:
        scale = StoredTensor(block_fp8.SUFFIX, FP32, block_fp8.scale_shape(shape), block_fp8.BLOCK)
        return StoredTensor("", block_fp8.DTYPE, shape), scale

    def quantise(self, rows: Tensor) -> tuple[Tensor, ...]:
        return block_fp8.quantise(rows, self.power_of_two)

    def dequantise(self, parts: Sequence[Tensor], columns: int, first_row: int) -> Tensor:
        return block_fp8.dequantise(parts[0], parts[1], first_row % block_fp8.BLOCK)

    @property
    def text(self) -> str:
        return f"fp8, blocks of {block_fp8.BLOCK} x {block_fp8.BLOCK}"


@dataclass(frozen=True)
class PackedInt(WeightFormat):
    """Integers with a scale for each group of inputs, or for each row: `pack-quantized` of compressed-tensors."""

    width: int
    group_size: int | None
    """None is one scale for each row."""

    @property
    def name(self) -> str:  # type: ignore[override]
        """Value of `convert.dtype`."""
        return f"int{self.width}"

    def stored(self, shape: Shape) -> tuple[StoredTensor, ...]:
        rows, columns = shape
        groups = 1 if self.group_size is None else columns // self.group_size
        packed = packed_int.columns_of(columns, self.width)
        return (
            StoredTensor(PACKED, DTYPES["int32"], (rows, packed)),
            StoredTensor(SCALE, BF16, (rows, groups)),
            StoredTensor(SHAPE, DTYPES["int64"], (2,), constant=struct.pack("<2q", rows, columns)),
        )

    def quantise(self, rows: Tensor) -> tuple[Tensor, ...]:
        return packed_int.quantise(rows, self.width, self.group_size or rows.shape[1])

    def dequantise(self, parts: Sequence[Tensor], columns: int, first_row: int) -> Tensor:
        return packed_int.dequantise(parts[0], parts[1], self.width, columns)

    @property
    def group(self) -> int | None:
        return self.group_size

    @property
    def text(self) -> str:
        return f"{self.name}, a scale for each {'row' if self.group_size is None else f'{self.group_size} inputs'}"


@dataclass(frozen=True)
class Mxfp4(WeightFormat):
    """E2M1 with a power of two for each 32 inputs: `mxfp4-pack-quantized` of compressed-tensors."""

    name = "mxfp4"

    def stored(self, shape: Shape) -> tuple[StoredTensor, ...]:
        rows, columns = shape
        return (
            StoredTensor(PACKED, DTYPES["uint8"], (rows, columns // 2)),
            StoredTensor(SCALE, DTYPES["uint8"], (rows, columns // mxfp4.GROUP)),
        )

    def quantise(self, rows: Tensor) -> tuple[Tensor, ...]:
        return mxfp4.quantise(rows)

    def dequantise(self, parts: Sequence[Tensor], columns: int, first_row: int) -> Tensor:
        return mxfp4.dequantise(parts[0], parts[1])

    @property
    def group(self) -> int | None:
        return mxfp4.GROUP

    @property
    def text(self) -> str:
        return f"mxfp4, a power of two for each {mxfp4.GROUP} inputs"


@dataclass(frozen=True)
class Choices:
    """Options of the formats, each None where it is not given."""

    group_size: int | None = None
    power_of_two: bool = True


FORMATS: dict[str, Callable[[Choices], WeightFormat]] = {
    "fp8": lambda options: BlockFp8(options.power_of_two),
    "int8": lambda options: PackedInt(8, options.group_size),
    "int4": lambda options: PackedInt(4, options.group_size or 128),
    "mxfp4": lambda options: Mxfp4(),
}
"""Formats by value of `convert.dtype`."""
GROUPED = ("int8", "int4")
"""Those whose group size can be chosen."""
