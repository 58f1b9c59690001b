"""Reads a checkpoint's table of contents without running code from it, and checks the files against it.

torch.distributed.checkpoint pickles that table (filesystem.py `FileSystemReader.read_metadata`), and a pickle can call
any function. It is therefore loaded here first, with nothing but the table's own types allowed.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint import metadata as table
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from moe_train.checkpoint.directory import METADATA, damaged
from parallel.errors import CheckpointError

if TYPE_CHECKING:  # tools read checkpoints without the seconds that Megatron-Core takes to import
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

_TABLE = {
    "torch.distributed.checkpoint.metadata": {*table.__all__, "_MEM_FORMAT_ENCODING"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "StorageMeta"},
    "torch": {"Size", *(name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype))},
    "torch.serialization": {"_get_layout"},  # name -> torch.layout
    "builtins": {"set", "list", "dict", "tuple"},
    "collections": {"OrderedDict", "defaultdict"},
    "pathlib": {"Path", "PosixPath"},  # where the writer stood
}


class _TableUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _TABLE.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is no part of a checkpoint")


def read(directory: Path) -> Metadata:
    """Table of contents of the checkpoint at `directory`.

    Raises:
        CheckpointError: it is missing, unreadable or holds anything but a table of contents; or a part of a tensor is
            in no file; or a file is missing or too short.
    """
    path = directory / METADATA
    try:
        with path.open("rb") as file:
            contents = _TableUnpickler(file).load()
    except FileNotFoundError:
        raise damaged(directory, f"{METADATA} is missing") from None
    except Exception as error:  # a damaged pickle raises nearly anything
        raise damaged(directory, f"{METADATA} cannot be read: {error or type(error).__name__}") from error
    if not isinstance(contents, Metadata) or contents.storage_data is None:
        raise damaged(directory, f"{METADATA} is no table of contents")
    _check_parts(directory, contents)
    _check_sizes(directory, contents)
    return contents


def _check_parts(directory: Path, contents: Metadata) -> None:
    for name, entry in contents.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            for chunk in entry.chunks:
                if MetadataIndex(name, chunk.offsets) not in contents.storage_data:
                    raise damaged(directory, f"the part of {name} at {tuple(chunk.offsets)} is in no file")


def _check_sizes(directory: Path, contents: Metadata) -> None:
    needed: dict[str, int] = {}
    for info in contents.storage_data.values():
        needed[info.relative_path] = max(needed.get(info.relative_path, 0), info.offset + info.length)
    for name, size in needed.items():
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
                "use the model settings of its config.yaml",
            )
        if tuple(entry.size) != shape:
            raise CheckpointError(
                f"{tensor.key} has shape {tuple(entry.size)} in checkpoint {directory} and {shape} in this model",
                "use the model settings of its config.yaml",
            )
