"""Bytes that a forward pass keeps for its backward pass, and what parameters, gradients and the optimizer hold."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


class SavedTensors:
    """Counts the storages that autograd keeps of the first forward pass of each module, each storage once.

    Parameters and buffers are left out, and so is what `moe_train.model.local.offload` offloads. A storage that
    recomputation has emptied by the end of the forward pass counts as what is left of it. Forward passes without
    gradients are not counted.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.modules = list(modules)
        self._bytes: dict[int, int] = {}
        self._handles: list[Any] = []
        self._open: Any = None
        self._saved: dict[int, torch.UntypedStorage] = {}

    def start(self) -> None:
        """Measure the next forward pass of each module."""
        self._bytes.clear()
        for number, module in enumerate(self.modules):
            self._handles.append(module.register_forward_pre_hook(lambda *_, number=number: self._enter(number)))
            self._handles.append(module.register_forward_hook(lambda *_, number=number: self._leave(number)))

    def stop(self) -> int:
        """Bytes of all modules together. No hook is left."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        return sum(self._bytes.values())

    def _enter(self, number: int) -> None:
        if number in self._bytes or not torch.is_grad_enabled():
            return
        self._saved = {}
        for offload in self._offloads(number):  # whose hooks replace these
            offload.observe = self._record
        self._open = torch.autograd.graph.saved_tensors_hooks(self._record, lambda tensor: tensor)
        self._open.__enter__()

    def _offloads(self, number: int) -> list[Any]:
        candidates = (getattr(module, "activation_offload", None) for module in self.modules[number].modules())
        return [offload for offload in candidates if offload is not None]

    def _record(self, tensor: Tensor) -> Tensor:
        tensor = tensor.detach()  # an output that its own node keeps would keep the node, too
        storage = tensor.untyped_storage()
        self._saved[storage._cdata] = storage
        return tensor

    def _leave(self, number: int) -> None:
        if self._open is None:
            return
        self._open.__exit__(None, None, None)
        self._open = None
        for offload in self._offloads(number):
            offload.observe = lambda tensor: None
        module = self.modules[number]
        own = {t.untyped_storage()._cdata for t in (*module.parameters(), *module.buffers())}
        self._bytes[number] = sum(storage.nbytes() for key, storage in self._saved.items() if key not in own)
        self._saved = {}


def static_bytes(modules: Iterable[nn.Module], optimizer: Any) -> tuple[int, int, int]:
    """Bytes of parameters, of their gradients, and of optimizer state with main weights, on this rank.

    Padding of the buffers in which Megatron-Core keeps gradients and shards of the optimizer is not counted.
    """
    parameters = {id(p): p for module in modules for p in module.parameters()}
    own = {p.untyped_storage()._cdata for p in parameters.values()}
    size = sum(_bytes(p) for p in parameters.values())
    gradients = sum(_bytes(p.main_grad) for p in parameters.values() if hasattr(p, "main_grad"))
    state = 0
    for adam in _torch_optimizers(optimizer):
        for parameter, values in adam.state.items():
            state += sum(_bytes(value) for value in values.values() if torch.is_tensor(value) and value.dim())
            if parameter.untyped_storage()._cdata not in own:  # an fp32 copy of a 16-bit weight
                state += _bytes(parameter)
    return size, gradients, state


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _torch_optimizers(optimizer: Any) -> Iterator[torch.optim.Optimizer]:
    """The torch optimizers inside of Megatron-Core's, which may be a chain."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if part.optimizer is not None:
            yield part.optimizer
