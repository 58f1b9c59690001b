"""Quantised weights among the tensors of a Hugging Face checkpoint: which there are, and their rows in bf16."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from moe_train.conversion.hf import quantization
from moe_train.formats import block_fp8
from moe_train.formats.dtypes import DTYPES
from moe_train.formats.tensor_slices import FileRegion, TensorSlice
from moe_train.formats.weight_formats import (
    GROUP_INDEX,
    PACKED,
    SHAPE,
    ZERO_POINT,
    BlockFp8,
    StoredTensor,
    WeightFormat,
)
from parallel.errors import CheckpointError

_FP8 = (DTYPES["float8_e4m3fn"], DTYPES["float8_e5m2"])
_LARGEST_SHAPE_BYTES = 64
_UNKNOWN = (ZERO_POINT, GROUP_INDEX, "_global_scale")
_RESTORE = "restore the files and the config.json that belong together"

Extents = Mapping[str, FileRegion]


@dataclass(frozen=True)
class QuantisedWeight:
    """A weight that is stored as several tensors."""

    format: WeightFormat
    shape: tuple[int, ...]
    parts: tuple[tuple[StoredTensor, FileRegion], ...]
    """Without those whose content follows from the shape."""

    def names(self, name: str) -> Iterator[str]:
        """Names of its tensors, where `name` is that of the weight."""
        for part in self.format.stored(self.shape):
            yield name + part.suffix

    def all_parts(self) -> Iterator[tuple[StoredTensor, FileRegion | None]]:
        """Its tensors with their places; None where the content follows from the shape."""
        places = {part.suffix: region for part, region in self.parts}
        for part in self.format.stored(self.shape):
            yield part, places.get(part.suffix)

    def read(self, start: int, stop: int) -> TensorSlice:
        """Rows `start` to `stop` in bf16."""
        stored = []
        for part, region in self.parts:
            first, last = start // part.weight_rows, -(-stop // part.weight_rows)
            stored.append(region.row_range(first, last).read().tensor())
        return TensorSlice.of(self.format.dequantise(stored, self.shape[1], start))


def collect(directory: Path, extents: Extents, declared: WeightFormat | None) -> dict[str, QuantisedWeight]:
    """The quantised weights of `extents`, by the name that a weight has without quantisation.

    Args:
        declared: what config.json says of them.

    Raises:
        CheckpointError: config.json declares another format, or a tensor of a weight is missing or unlike the others.
    """
    found: dict[str, QuantisedWeight] = {}
    for name, extent in extents.items():
        if extent.dtype in _FP8:
            found[name] = _fp8(directory, extents, name)
        elif name.endswith("weight" + PACKED):
            weight = name.removesuffix(PACKED)
            found[weight] = _packed(directory, extents, weight, declared)
    for name, quantised in found.items():
        for suffix in _UNKNOWN:
            if name + suffix in extents:
                raise CheckpointError(
                    f"{directory} has {name}{suffix}, which {quantised.format.name} here does not have",
                    "name a checkpoint with symmetric weights in their original order",
                )
    return found


def _fp8(directory: Path, extents: Extents, name: str) -> QuantisedWeight:
    extent, scale = extents[name], extents.get(name + block_fp8.SUFFIX)
    expected = block_fp8.scale_shape(extent.shape) if len(extent.shape) == 2 else None
    if scale is None or scale.shape != expected or extent.dtype != block_fp8.DTYPE or not scale.dtype.is_floating_point:
        raise CheckpointError(
            f"{directory}: {name} is {extent.dtype} {list(extent.shape)}, and its {block_fp8.SUFFIX[1:]} "
            f"{'is missing' if scale is None else f'is {scale.dtype} {list(scale.shape)}'}",
            f"FP8 here is float8_e4m3fn with one scale for each block of {block_fp8.BLOCK} x {block_fp8.BLOCK}",
        )
    weights = BlockFp8()
    parts = zip(weights.stored(extent.shape), (extent, scale), strict=True)
    return QuantisedWeight(weights, extent.shape, tuple(parts))


def _packed(directory: Path, extents: Extents, name: str, declared: WeightFormat | None) -> QuantisedWeight:
    if declared is None or isinstance(declared, BlockFp8):
        raise CheckpointError(
            f"{directory} has {name}{PACKED}, and its config.json declares no {quantization.COMPRESSED_TENSORS} format",
            f"restore {quantization.KEY} of config.json",
        )
    shape = _shape(directory, extents, name)
    if declared.group is not None and shape[1] % declared.group:
        raise CheckpointError(f"{directory}: {name} has {shape[1]} columns, and {declared.text}", _RESTORE)
    parts = []
    for part in declared.stored(shape):
        region = extents.get(name + part.suffix)
        if region is None or region.shape != part.shape or not _same_kind(part, region):
            stored = "is missing" if region is None else f"is {region.dtype} {list(region.shape)}"
            raise CheckpointError(
                f"{directory}: {name}{part.suffix} {stored}, and it is {part.dtype} {list(part.shape)} for a weight of "
                f"{list(shape)} in the format of config.json ({declared.text})",
                _RESTORE,
            )
        if part.constant is None:
            parts.append((part, region))
    return QuantisedWeight(declared, shape, tuple(parts))


def _same_kind(part: StoredTensor, region: FileRegion) -> bool:
    """Whether a tensor has the kind of numbers that it should. Other writers have scales and shapes in other widths."""
    if part.constant is not None or part.dtype.is_floating_point:
        return region.dtype.is_floating_point == part.dtype.is_floating_point
    return region.dtype == part.dtype


def _shape(directory: Path, extents: Extents, name: str) -> tuple[int, int]:
    """Shape of a packed weight: the one that is stored, else the one that follows from bytes of two numbers."""
    packed, stored = extents[name + PACKED], extents.get(name + SHAPE)
    if len(packed.shape) == 2 and stored is None and packed.dtype.itemsize == 1:
        return packed.shape[0], packed.shape[1] * 2
    if stored is not None and len(packed.shape) == 2 and stored.bytes <= _LARGEST_SHAPE_BYTES:
        values = [int(value) for value in stored.read().tensor().reshape(-1)]
        if len(values) == 2 and min(values) > 0:
            return values[0], values[1]
    raise CheckpointError(
        f"{directory}: {name}{SHAPE} is missing, or not the shape of a weight with {list(packed.shape)} packed numbers",
        _RESTORE,
    )
