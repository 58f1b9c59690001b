"""Safetensors files: their table of contents, and writing them tensor by tensor.

The `safetensors` library writes a file only from tensors that are all in memory, and reads through a mapped file; here
memory is bounded by one tensor. The format (github.com/huggingface/safetensors) is 8 bytes of length, JSON, data.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

from moe_train.files import untrusted
from moe_train.formats.dtypes import DTYPES, Dtype
from moe_train.formats.tensor_slices import FileRegion, truncated
from parallel.errors import CheckpointError

_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_ALIGNMENT = 8
_MOST_AXES = 64

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def header(tensors: Sequence[tuple[str, Dtype, tuple[int, ...]]]) -> bytes:
    """The start of a file that holds `tensors`, (name, dtype, shape) each, one after the other."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in tensors:
        start, end = end, end + prod(shape) * dtype.itemsize
        table[name] = {"dtype": _NAMES[dtype.name], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def contents(path: Path) -> dict[str, FileRegion]:
    """The region of the file that holds each tensor.

    Raises:
        CheckpointError: the file is missing, no safetensors file, damaged or cut off.
    """
    try:
        with untrusted.open_binary(path) as file:
            size = os.fstat(file.fileno()).st_size
            length = struct.unpack("<Q", file.read(8))[0] if size >= 8 else -1
            if not 0 < length <= min(size - 8, untrusted.LARGEST_JSON_BYTES):
                raise _damaged(path, "its header does not fit into the file")
            table = untrusted.parse_json(file.read(length))
        table.pop("__metadata__", None)
        regions = {name: _extent(path, 8 + length, entry) for name, entry in table.items()}
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}", "restore the file from a copy") from error
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from error
    position = 8 + length
    for extent in sorted(
        regions.values(), key=lambda e: (e.offset, prod(e.shape))
    ):  # an empty one ends where it begins
        if extent.offset != position:
            raise _damaged(path, "its tensors overlap or leave gaps")
        position += prod(extent.shape) * extent.dtype.itemsize
    if position > size:
        raise truncated(path, position)
    if position < size:
        raise _damaged(path, f"it has {size - position:,} bytes that belong to no tensor")
    return regions


def _extent(path: Path, base: int, entry: dict[str, Any]) -> FileRegion:
    if entry["dtype"] not in _DTYPES:
        raise CheckpointError(
            f"{path} has numbers of format {entry['dtype']}, which cannot be read",
            f"supported are {', '.join(_DTYPES)}",
        )
    dtype, shape = DTYPES[_DTYPES[entry["dtype"]]], tuple(entry["shape"])
    start, stop = entry["data_offsets"]
    if len(shape) > _MOST_AXES or not all(type(n) is int and n >= 0 for n in (*shape, start, stop)):
        raise ValueError("a shape or a place has something other than sizes")
    if stop - start != prod(shape) * dtype.itemsize:
        raise ValueError(f"{entry['dtype']} {list(shape)} does not take {stop - start} bytes")
    return FileRegion(path, base + start, dtype, shape)


def _damaged(path: Path, defect: str) -> CheckpointError:
    return CheckpointError(f"{path} is damaged: {defect}", "restore the file from a copy")


def open_directory(directory: Path) -> dict[str, FileRegion]:
    """Every tensor of a checkpoint directory: of the files that its index names, or of its only file.

    Raises:
        CheckpointError: there is none, a file is damaged, or the index and the files disagree.
    """
    index = directory / INDEX
    if not index.is_file():
        files = [directory / SINGLE] if (directory / SINGLE).is_file() else sorted(directory.glob("*.safetensors"))
        if not files:
            others = ", ".join(sorted(p.name for p in directory.glob("*.bin"))[:1])
            why = f" (it has {others}: pickled weights are never loaded)" if others else ""
            raise CheckpointError(f"{directory} has no .safetensors file{why}", "name a directory that has them")
        return _merged(files)
    try:
        wanted: dict[str, str] = untrusted.read_json(index)["weight_map"]
        names = sorted(set(wanted.values()))
        if any(not isinstance(name, str) or Path(name).name != name for name in names):
            raise ValueError("it names files outside the directory")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} cannot be read: {error}", "restore the file from a copy") from error
    regions = _merged([directory / file for file in names])
    for name in sorted(wanted.keys() ^ regions.keys()):
        where, other = (INDEX, wanted[name]) if name in wanted else ("its file", INDEX)
        raise CheckpointError(f"{directory}: {name} is in {where} and not in {other}", "restore the files from a copy")
    for name, extent in regions.items():
        if extent.path.name != wanted[name]:
            raise CheckpointError(
                f"{directory}: {name} is in {extent.path.name}, and {INDEX} says {wanted[name]}",
                "restore the files from a copy",
            )
    return regions


def _merged(files: Sequence[Path]) -> dict[str, FileRegion]:
    regions: dict[str, FileRegion] = {}
    for file in files:
        for name, extent in contents(file).items():
            if name in regions:
                raise CheckpointError(
                    f"{name} is in {regions[name].path} and in {file.name}", "leave one of the files in the directory"
                )
            regions[name] = extent
    return regions
