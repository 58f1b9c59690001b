"""Activations that wait for their backward pass outside of the memory in which they were computed (`local`, CPU).

Megatron-Core moves them between a GPU and its host; here a file, or other memory, is used instead of the host.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from parallel.errors import HardwareError

Read = Callable[[], torch.UntypedStorage]


class OtherMemory:
    """Keeps copies of storages in memory of their own."""

    def write(self, storage: torch.UntypedStorage) -> Read:
        """Copy `storage` and return how to get it back."""
        copy = storage.clone()
        return lambda: copy


class Scratch:
    """Keeps copies of storages in a file without a name: it goes when the last of them is no longer needed, or with
    the process, however that ends.

    Raises:
        HardwareError: the file cannot be made, written or read.
    """

    def __init__(self, directory: Path) -> None:
        self._directory, self._size = directory, 0
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115  # see above
        except OSError as error:
            raise self._failed("make a file", error) from error

    def write(self, storage: torch.UntypedStorage) -> Read:
        """Append `storage` to the file and return how to read it."""
        place, size = self._size, storage.nbytes()
        done, data = 0, _bytes(storage)
        try:
            while done < size:  # one call moves no more than 2 GiB
                done += os.pwrite(self._file.fileno(), data[done:], place + done)
        except OSError as error:
            raise self._failed(f"write {size} bytes", error) from error
        self._size += size
        return lambda: self._read(place, size)

    def _read(self, place: int, size: int) -> torch.UntypedStorage:
        storage = torch.UntypedStorage(size)
        done, data = 0, _bytes(storage)
        try:
            while done < size:
                part = os.preadv(self._file.fileno(), [data[done:]], place + done)
                if not part:
                    raise OSError(None, f"the file ends at byte {place + done}")
                done += part
        except OSError as error:
            raise self._failed(f"read {size} bytes", error) from error
        return storage

    def _failed(self, operation: str, error: OSError) -> HardwareError:
        return HardwareError(
            f"recompute.offload=file cannot {operation} of activations in {self._directory}: {error.strerror}",
            "free space there, set run_dir to another disk, or set recompute.offload=none",
        )


def _bytes(storage: torch.UntypedStorage) -> memoryview:
    """Its memory, while it exists. numpy's view would forbid torch to resize it, as recomputation does."""
    return memoryview((ctypes.c_ubyte * storage.nbytes()).from_address(storage.data_ptr())).cast("B")


class Offload:
    """Around a forward pass: activations that autograd saves are offloaded, and reloaded for the backward pass.

    Each storage is written once, unless it changes in between. Parameters, buffers and storages of less than
    `min_bytes` stay; `observe` is called with each tensor that stays, parameters too.
    """

    def __init__(self, model: nn.Module, store: Callable[[], OtherMemory | Scratch], min_bytes: int) -> None:
        self._model, self._new_store, self._min_bytes = model, store, min_bytes
        self.observe: Callable[[Tensor], object] = lambda tensor: None
        self._own: set[int] = set()
        self._store: OtherMemory | Scratch | None = None
        # A storage that is gone leaves its address to others, but not while there is a weak reference to it.
        self._written: dict[int, tuple[StorageWeakRef, int, Read]] = {}
        self._hooks: Any = None

    def __enter__(self) -> None:
        # Megatron-Core moves parameters into its buffers after the model was built, so they are looked up each time.
        tensors = (*self._model.parameters(), *self._model.buffers())
        self._own = {tensor.untyped_storage()._cdata for tensor in tensors}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)
        self._hooks.__enter__()

    def __exit__(self, *_: object) -> None:
        self._hooks.__exit__(None, None, None)
        self._store, self._written = None, {}  # from now on each lives as long as the graph that refers to it

    def _pack(self, tensor: Tensor) -> Any:
        storage = tensor.untyped_storage()
        plain = tensor.device.type == "cpu" and tensor.layout is torch.strided
        if not plain or storage.nbytes() < self._min_bytes or storage._cdata in self._own:
            self.observe(tensor)
            return tensor.detach()  # an output that its own node keeps would keep the node, too
        reference, version, read = self._written.get(storage._cdata, (None, -1, None))
        if read is None or reference is None or reference.expired() or version != tensor._version:
            self._store = self._store or self._new_store()
            read = self._store.write(storage)
            self._written[storage._cdata] = StorageWeakRef(storage), tensor._version, read
        return read, tensor.dtype, tensor.storage_offset(), tensor.size(), tensor.stride()


def _unpack(packed: Any) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    read, dtype, offset, size, stride = packed
    return torch.empty(0, dtype=dtype).set_(read(), offset, size, stride)


def wrap_forward(model: Any, where: str, scratch: Path, min_bytes: int) -> None:
    """Have forward passes of `model` offload saved activations: to `memory`, or to a `file` in `scratch`."""
    offload = Offload(model, OtherMemory if where == "memory" else lambda: Scratch(scratch), min_bytes)
    forward = model.forward

    def forward_with_offload(*args: Any, **options: Any) -> Any:
        with offload:
            return forward(*args, **options)

    model.forward, model.activation_offload = forward_with_offload, offload
