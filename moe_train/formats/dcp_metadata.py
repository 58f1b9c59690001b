"""Reads a checkpoint's table of contents without running code from it, and checks the files against it.

torch.distributed.checkpoint pickles that table (filesystem.py `FileSystemReader.read_metadata`), and a pickle can call
any function. It is therefore read by `pickled.load`, with nothing but the table's own types allowed, and into the
classes below, which have the fields of torch's (metadata.py, filesystem.py) and spare a tool the second and more that
those take to import. `dump` writes a table from them. No torch import.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_train.files import untrusted
from moe_train.formats import pickled
from moe_train.formats.dtypes import DTYPES, Dtype
from moe_train.formats.pickled import Plain
from moe_train.formats.run_directory import METADATA, damaged
from parallel.errors import CheckpointError

if TYPE_CHECKING:  # tools read checkpoints without the seconds that Megatron-Core takes to import
    from megatron.core.dist_checkpointing.mapping import ShardedTensor


EMA, EMA_PREFIX = "ema", "ema."
"""Of the EMA of the weights: K is the name of a parameter, and `ema.K` that of its average."""
_LARGEST_BYTES = 1 << 30
"""Of a table of contents. That of DeepSeek-V3 with its optimizer, over 2,048 ranks, has some 30 MB."""
_MOST_AXES, _LARGEST_SIZE = 64, 1 << 62
_MOST_FIELDS = 32


class _Fields(Plain):
    """An object with named fields, of which the annotated ones are kept."""

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict) or len(state) > _MOST_FIELDS:
            raise pickle.UnpicklingError(f"{type(self).__name__} has other fields")
        for name in self.__annotations__:
            if name in state:
                object.__setattr__(self, name, state[name])


class Other(Plain):
    """An entry that is not a tensor, or a fact about the writing: what a class or function made of its arguments."""

    def __init__(self, *arguments: Any) -> None:
        self._arguments = arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._arguments

    def __setstate__(self, state: Any) -> None:
        """What it says of itself is of no interest."""


class _Layout(Other): ...


class _MemoryFormat(Other): ...


class Size(Plain, tuple[int, ...]):
    """A shape, or a place in a tensor."""

    __slots__ = ()

    def __new__(cls, numbers: Any = ()) -> Size:
        if not isinstance(numbers, tuple) or len(numbers) > _MOST_AXES or not all(map(_is_size, numbers)):
            raise ValueError("a shape has something other than sizes")
        return tuple.__new__(cls, numbers)

    def __reduce__(self) -> tuple[Any, ...]:
        return Size, (tuple(self),)


@dataclass
class ChunkStorageMetadata(_Fields):
    """A box of a tensor."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass
class TensorProperties(Plain):
    """Of a tensor, only what is not deprecated."""

    dtype: Dtype

    def __getstate__(self) -> tuple[Any, ...]:
        return self.dtype, _Layout("torch.strided"), False, _MemoryFormat(0), False

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = state[0]


@dataclass
class TensorStorageMetadata(_Fields):
    """A tensor and its parts."""

    properties: TensorProperties
    size: tuple[int, ...]
    chunks: list[ChunkStorageMetadata]


@dataclass(frozen=True)
class MetadataIndex(_Fields):
    """Names a part of a tensor."""

    fqn: str
    offset: tuple[int, ...] | None = None
    index: int | None = field(compare=False, default=None)

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        if type(self.fqn) is not str or not (self.offset is None or isinstance(self.offset, Size)):
            raise ValueError("a part has no name")  # and its hash might never end


@dataclass
class StorageInfo(_Fields):
    """Where a part is."""

    relative_path: str
    offset: int
    length: int


@dataclass
class Metadata(_Fields):
    """A table of contents: entries by name, and the place of each part."""

    state_dict_metadata: dict[str, TensorStorageMetadata | Other]
    storage_data: dict[MetadataIndex, StorageInfo]


_WRITTEN: dict[tuple[str, str], Any] = {
    ("torch.distributed.checkpoint.metadata", "Metadata"): Metadata,
    ("torch.distributed.checkpoint.metadata", "MetadataIndex"): MetadataIndex,
    ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"): TensorStorageMetadata,
    ("torch.distributed.checkpoint.metadata", "TensorProperties"): TensorProperties,
    ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"): ChunkStorageMetadata,
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"): _MemoryFormat,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): StorageInfo,
    ("torch.serialization", "_get_layout"): _Layout,
    ("torch", "Size"): Size,
    **{("torch", name): dtype for name, dtype in DTYPES.items()},
}
_READ = _WRITTEN | {
    ("torch.distributed.checkpoint.metadata", "BytesStorageMetadata"): Other,
    ("torch.distributed.checkpoint.metadata", "StorageMeta"): Other,
    ("torch.distributed.checkpoint.filesystem", "StorageMeta"): Other,
}


def _empty(*_: Any) -> dict[Any, Any]:
    return {}


_NAMES = _READ | {
    **{(module, name): Other for module in ("builtins", "__builtin__") for name in ("set", "list", "dict", "tuple")},
    ("collections", "OrderedDict"): _empty,
    ("collections", "defaultdict"): _empty,
    # Where the writer put the checkpoint. Python 3.13 names another module than those before and after it.
    **{(module, name): Other for module in ("pathlib", "pathlib._local") for name in ("Path", "PosixPath")},
}


def dump(contents: Metadata) -> bytes:
    """The file that torch.distributed.checkpoint would write."""
    return renamed(pickle.dumps(contents, protocol=2), _WRITTEN)


def renamed(pickled: bytes, stand_ins: Mapping[tuple[str, str], Any]) -> bytes:
    """A pickle of protocol 2 in which stand-ins of this project have the (module, name) of what they stand for.

    In that protocol a name is a line of text by itself, and nothing depends on its length.
    """
    for (module, name), ours in stand_ins.items():
        own_name = ours.name if isinstance(ours, Dtype) else ours.__qualname__
        pickled = pickled.replace(f"c{ours.__module__}\n{own_name}\n".encode(), f"c{module}\n{name}\n".encode())
    return pickled


def read(directory: Path) -> Metadata:
    """Table of contents of the checkpoint at `directory`.

    Raises:
        CheckpointError: it is missing, unreadable or holds anything but a table of contents; or a part of a tensor is
            in no file; or a file is missing or too short.
    """
    try:
        contents = pickled.load(untrusted.read_bytes(directory / METADATA, _LARGEST_BYTES), _NAMES)
    except FileNotFoundError:
        raise damaged(directory, f"{METADATA} is missing") from None
    except Exception as error:  # a damaged pickle raises nearly anything
        raise damaged(directory, f"{METADATA} cannot be read: {error or type(error).__name__}") from error
    if not isinstance(contents, Metadata) or not isinstance(getattr(contents, "storage_data", None), dict):
        raise damaged(directory, f"{METADATA} is not a table of contents")
    try:
        _check_parts(directory, contents)
        _check_sizes(directory, contents)
    except (AttributeError, TypeError, ValueError) as error:  # the right types with other things inside
        raise damaged(directory, f"{METADATA} is not a table of contents: {error}") from error
    return contents


def _check_parts(directory: Path, contents: Metadata) -> None:
    for name, entry in contents.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            if not isinstance(entry.properties.dtype, Dtype) or not isinstance(entry.size, Size):
                raise ValueError(f"{name} has no shape")
            for chunk in entry.chunks:
                _check_part(directory, contents, name, entry, chunk)


def _check_part(
    directory: Path, contents: Metadata, name: str, entry: TensorStorageMetadata, chunk: ChunkStorageMetadata
) -> None:
    if not isinstance(chunk.offsets, Size) or not isinstance(chunk.sizes, Size):
        raise ValueError(f"a part of {name} has no shape")
    inside = (at + size <= whole for at, size, whole in zip(chunk.offsets, chunk.sizes, entry.size, strict=True))
    if not all(inside):
        raise damaged(directory, f"the part of {name} at {tuple(chunk.offsets)} is not inside {tuple(entry.size)}")
    place = contents.storage_data.get(MetadataIndex(name, chunk.offsets))
    if place is None:
        raise damaged(directory, f"the part of {name} at {tuple(chunk.offsets)} is in no file")
    needed = prod(chunk.sizes) * entry.properties.dtype.itemsize
    if not isinstance(place, StorageInfo) or not _is_size(place.length) or place.length < needed:
        raise damaged(directory, f"the part of {name} at {tuple(chunk.offsets)} does not fit into its item")


def _is_size(number: Any) -> bool:
    return type(number) is int and 0 <= number < _LARGEST_SIZE


def _check_sizes(directory: Path, contents: Metadata) -> None:
    needed: dict[str, int] = {}
    for info in contents.storage_data.values():
        if not _is_size(info.offset) or not _is_size(info.length):
            raise ValueError(f"an item of {info.relative_path} has no place")
        needed[info.relative_path] = max(needed.get(info.relative_path, 0), info.offset + info.length)
    for name, size in needed.items():
        if Path(name).name != name:
            raise damaged(directory, f"{METADATA} names {name}, which is not one of its files")
        path = directory / name
        if not path.is_file():
            raise damaged(directory, f"{name} is missing")
        if path.stat().st_size < size:
            raise damaged(directory, f"{name} has {path.stat().st_size:,} bytes of at least {size:,}")


def check_tensors(contents: Metadata, wanted: Iterable[ShardedTensor], directory: Path) -> None:
    """Raise CheckpointError where the checkpoint lacks a `wanted` tensor or has it in another global shape."""
    for tensor in wanted:
        entry, shape = contents.state_dict_metadata.get(tensor.key), tuple(tensor.global_shape)
        # Anything but a tensor would be unpickled without restriction by torch's load planner.
        if not isinstance(entry, TensorStorageMetadata):
            raise CheckpointError(
                f"checkpoint {directory} has no tensor {tensor.key}, which this model has with shape {shape}",
                "restore all of its files from one copy, or use the settings of the run that wrote the tensors",
            )
        if tuple(entry.size) != shape:
            raise CheckpointError(
                f"{tensor.key} has shape {tuple(entry.size)} in checkpoint {directory} and {shape} in this model",
                "restore all of its files from one copy, or use the settings of the run that wrote the tensors",
            )
