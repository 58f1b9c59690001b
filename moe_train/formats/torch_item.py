"""The description of a tensor in a file that torch.save wrote (`data.pkl`), read without torch and without its pickles.

torch/_utils.py `_rebuild_tensor_v2`, `_rebuild_tensor_v3` and `_rebuild_parameter`; torch/serialization.py `_save`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

from moe_train.formats import pickled
from moe_train.formats.dtypes import DTYPES, Dtype

STORAGES = {
    "float32": "FloatStorage", "bfloat16": "BFloat16Storage", "float16": "HalfStorage", "float64": "DoubleStorage",
    "int64": "LongStorage", "int32": "IntStorage", "int16": "ShortStorage", "int8": "CharStorage",
    "uint8": "ByteStorage", "bool": "BoolStorage",
}  # fmt: skip
"""Format of numbers -> the class that a pickle names for it."""

_UNTYPED = DTYPES["uint8"]


@dataclass(frozen=True)
class TensorDescription:
    """What a pickle says of a tensor."""

    dtype: Dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    first: int
    """Number of the storage at which it begins."""
    bytes: int
    """Of the storage."""

    @property
    def is_whole(self) -> bool:
        """Whether it is its storage, from start to end, in order."""
        wanted = [prod(self.shape[axis + 1 :]) for axis in range(len(self.shape))]
        ordered = all(n < 2 or s == w for n, s, w in zip(self.shape, self.strides, wanted, strict=True))
        return self.first == 0 and ordered and self.bytes == prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class _StorageReference:
    dtype: Dtype
    numbers: int


def described(data: bytes) -> TensorDescription:
    """The tensor that `data`, the pickle of a file by torch.save, describes.

    Raises:
        ValueError, TypeError, pickle.UnpicklingError, ...: it is damaged, or describes anything but one tensor.
    """
    description = pickled.load(data, _NAMES, _storage)
    if not isinstance(description, TensorDescription):
        raise ValueError("it is not a tensor")
    return description


def _storage(reference: Any) -> _StorageReference:
    kind, dtype, name, _, numbers = reference
    if kind != "storage" or name != "0" or not isinstance(dtype, Dtype) or type(numbers) is not int:
        raise ValueError("its numbers are not in one piece")
    return _StorageReference(dtype, numbers)


def _rebuild(storage: Any, first: Any, shape: Any, strides: Any, *_: Any) -> TensorDescription:
    return _description(storage, storage.dtype, first, shape, strides)


def _rebuild_untyped(
    storage: Any, first: Any, shape: Any, strides: Any, requires_grad: Any, hooks: Any, dtype: Any, *_: Any
) -> TensorDescription:
    return _description(storage, dtype, first, shape, strides)


def _description(storage: Any, dtype: Any, first: Any, shape: Any, strides: Any) -> TensorDescription:
    sizes = (first, *shape, *strides)
    plain = isinstance(storage, _StorageReference) and isinstance(dtype, Dtype) and len(shape) == len(strides)
    if not plain or not all(type(n) is int and n >= 0 for n in sizes):
        raise ValueError("it is not a tensor")
    return TensorDescription(dtype, tuple(shape), tuple(strides), first, storage.numbers * storage.dtype.itemsize)


def _parameter(data: Any, *_: Any) -> Any:
    return data


_NAMES: pickled.Names = {
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_untyped,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch.storage", "UntypedStorage"): _UNTYPED,
    ("collections", "OrderedDict"): lambda *_: {},  # hooks, which a tensor has none of
    **{("torch", STORAGES[name]): DTYPES[name] for name in STORAGES},
    **{("torch", name): dtype for name, dtype in DTYPES.items()},
}
