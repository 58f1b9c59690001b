"""Memory of the paged KV cache: the tensors of `parallel/architecture/kv_cache.py`, in blocks of tokens.

A token has a slot: the number of its block times the block size, plus its position in the block.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_train.inference.blocks import BlockCopy
from moe_train.model.local.cached_attention import Slots
from parallel.architecture.kv_cache import CachePart

_DTYPES = {
    "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.float8_e4m3fn,
    "int8": torch.int8, "int4": torch.uint8,
}  # fmt: skip
_LARGEST = {"fp8": 448.0, "int8": 127.0, "int4": 7.0}


def format_of(dtype: torch.dtype) -> str:
    """The format that keeps activations of `dtype` without rounding."""
    return next(name for name, stored in _DTYPES.items() if stored is dtype)


class PagedTensor:
    """One tensor of one layer's cache, [slot, heads, width] in the format of its part.

    Args:
        dtype: of what is written and read.
    """

    def __init__(self, part: CachePart, num_slots: int, dtype: torch.dtype, device: torch.device) -> None:
        self.part, self.dtype = part, dtype
        stored = _DTYPES[part.format.name]
        columns = part.data_bytes // stored.itemsize
        self._data = torch.zeros(num_slots, part.heads, columns, dtype=stored, device=device)
        self._is_exact = stored is dtype
        self._scales: Tensor | None = None
        if part.format.scaled:
            self._scales = torch.zeros(num_slots, part.heads, part.num_scales, device=device)

    @property
    def num_bytes(self) -> int:
        """Allocated memory."""
        return sum(x.numel() * x.itemsize for x in self._tensors())

    @property
    def is_exact(self) -> bool:
        """Whether what is read is what was written, bit by bit."""
        return self._is_exact

    def write(self, slots: Tensor, x: Tensor) -> None:
        """Store `x` [t, heads, width] in `slots` [t]."""
        if self._scales is None:
            self._data.index_copy_(0, slots, x if self.is_exact else x.to(self._data.dtype))
        else:
            data, scales = quantise(x, self.part)
            self._bytes[slots] = data.view(torch.uint8)
            self._scales[slots] = scales

    def read(self, slots: Slots) -> Tensor:
        """What is stored in `slots` [...]: [..., heads, width] in `dtype`, a view of the cache where possible."""
        if isinstance(slots, slice):
            if self._is_exact:
                return self._data[slots]
            return self._decoded(*(x[slots] for x in self._tensors()))
        flat = slots.flatten()
        x = self._decoded(*(x.index_select(0, flat) for x in self._tensors()))
        return x.view(*slots.shape, *x.shape[1:])

    def _decoded(self, data: Tensor, scales: Tensor | None = None) -> Tensor:
        """Stored numbers [t, heads, columns], and the scales of scaled formats -> [t, heads, width] in `dtype`."""
        if scales is None:
            return data.to(self.dtype)
        return dequantise(data.view(self._data.dtype), scales, self.part).to(self.dtype)

    def clear(self, slots: slice) -> None:
        """Set the stored numbers of some slots to zero."""
        for x in self._tensors():
            x[slots] = 0

    def copy(self, source: slice, target: slice) -> None:
        """Copy the stored numbers of some slots to others."""
        for x in self._tensors():
            x[target] = x[source]

    @property
    def _bytes(self) -> Tensor:
        # Torch indexes no FP8 tensors on a CPU.
        return self._data.view(torch.uint8)

    def _tensors(self) -> Iterable[Tensor]:
        yield self._bytes if self._scales is not None else self._data
        if self._scales is not None:
            yield self._scales


def quantise(x: Tensor, part: CachePart) -> tuple[Tensor, Tensor]:
    """`x` [t, heads, width] in the scaled format of `part`: data [t, heads, columns], fp32 scales [t, heads, groups].

    The largest magnitude of a group becomes the largest number of the format. The range of int4 is -7 to 7.
    """
    groups = x.float().unflatten(-1, (part.num_scales, part.group))
    amax = groups.abs().amax(dim=-1)
    scales = (amax / _LARGEST[part.format.name]).clamp_min(torch.finfo(torch.float32).tiny)
    scaled = (groups / scales.unsqueeze(-1)).flatten(-2)
    if part.format.name == "fp8":
        return scaled.to(torch.float8_e4m3fn), scales
    whole = scaled.round()
    if part.format.name == "int8":
        return whole.to(torch.int8), scales
    nibbles = F.pad((whole + 8).to(torch.uint8), (0, part.width % 2))
    return nibbles[..., ::2] | nibbles[..., 1::2] << 4, scales


def dequantise(data: Tensor, scales: Tensor, part: CachePart) -> Tensor:
    """The fp32 values [t, heads, width] of what `quantise` returned."""
    if part.format.name == "int4":
        values = torch.stack([data & 15, data >> 4], dim=-1).flatten(-2)[..., : part.width].float() - 8
    else:
        values = data.float()
    return values.unflatten(-1, (part.num_scales, part.group)).mul(scales.unsqueeze(-1)).flatten(-2)


@dataclass(frozen=True)
class LayerCache:
    """The tensors of one layer, by the names of their parts."""

    tensors: dict[str, PagedTensor]

    @cached_property
    def is_exact(self) -> bool:
        """Whether what is read is what was written, bit by bit."""
        return all(tensor.is_exact for tensor in self.tensors.values())

    def write(self, slots: Tensor, **parts: Tensor) -> None:
        """Store [t, heads, width] of each part in `slots` [t]."""
        for name, x in parts.items():
            self.tensors[name].write(slots, x)

    def read(self, name: str, slots: Slots) -> Tensor:
        """One part of `slots` [...]: [..., heads, width]."""
        return self.tensors[name].read(slots)


class PagedKVCache:
    """The KV cache of the layers of one rank.

    Args:
        layers: their numbers in the model, which Megatron-Core counts from 1.
        dtype: of the model's activations.
    """

    def __init__(
        self, parts: Sequence[CachePart], layers: Iterable[int], num_blocks: int, block_size: int,
        dtype: torch.dtype, device: torch.device,
    ) -> None:  # fmt: skip
        self.num_blocks, self.block_size, self.dtype = num_blocks, block_size, dtype
        slots = num_blocks * block_size
        self._layers = {
            layer: LayerCache({part.name: PagedTensor(part, slots, dtype, device) for part in parts})
            for layer in layers
        }

    @property
    def num_bytes(self) -> int:
        """Allocated memory of this rank."""
        return sum(tensor.num_bytes for layer in self._layers.values() for tensor in layer.tensors.values())

    def layer(self, number: int) -> LayerCache:
        """The tensors of one layer."""
        return self._layers[number]

    def clear(self, blocks: Iterable[int]) -> None:
        """Set blocks to zero. Attention reads whole blocks: what it masks is multiplied by zero."""
        for block in blocks:
            for layer in self._layers.values():
                for tensor in layer.tensors.values():
                    tensor.clear(slice(block * self.block_size, (block + 1) * self.block_size))

    def copy(self, copies: Iterable[BlockCopy]) -> None:
        """Copy blocks, one after the other, in all layers."""
        for copy in copies:
            source, target = (
                slice(block * self.block_size, (block + 1) * self.block_size) for block in (copy.source, copy.target)
            )
            for layer in self._layers.values():
                for tensor in layer.tensors.values():
                    tensor.copy(source, target)
