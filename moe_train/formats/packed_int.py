"""Integers of 4 or 8 bits with one scale for each group of inputs, packed as compressed-tensors does.

A weight is `(code - 2^(bits-1)) * weight_scale`: symmetric, without zero points. Codes lie one after the other from the
lowest bit of an int32 (`pack_to_int32` of compressed-tensors; vLLM's WNA16 layers read the same), and a row ends with
a whole int32. The scale of a group is its largest absolute value over half of the range, as llm-compressor rounds to
nearest; it is rounded to bf16 first, so that codes are the nearest for the scale that is stored.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # names and shapes are wanted where nothing is computed
    from torch import Tensor

WORD_BITS = 32


def columns_of(columns: int, bits: int) -> int:
    """int32 columns of a packed row of `columns` numbers."""
    return -(-columns * bits // WORD_BITS)


def quantise(rows: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """Packed codes int32 [n, columns_of(in)] and scales bf16 [n, in / group] of rows [n, in]."""
    import torch

    largest = 2 ** (bits - 1)
    values = rows.float().unflatten(-1, (-1, group))
    scale = (values.abs().amax(dim=-1) / (largest - 0.5)).bfloat16()
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)  # a group of zeros
    codes = values.div(scale.float().unsqueeze(-1)).round_().clamp_(-largest, largest - 1)
    return _pack(codes.flatten(-2).add_(largest).to(torch.uint8), bits), scale


def dequantise(packed: Tensor, scale: Tensor, bits: int, columns: int) -> Tensor:
    """Rows [n, columns] in bf16."""
    codes = unpack(packed, bits, columns)
    values = codes.unflatten(-1, (scale.shape[1], -1)).float().mul_(scale.float().unsqueeze(-1))
    return values.flatten(-2).bfloat16()


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Integers int8 [n, columns], without the offset that codes have."""
    import torch

    codes = packed.view(torch.uint8)
    if bits == 4:
        codes = torch.stack((codes & 0xF, codes >> 4), dim=-1).flatten(-2)
    return codes[:, :columns].to(torch.int16).sub_(2 ** (bits - 1)).to(torch.int8)


def _pack(codes: Tensor, bits: int) -> Tensor:
    import torch

    per_word = WORD_BITS // bits
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[1] % per_word))
    if bits == 4:
        codes = codes[:, 0::2] | codes[:, 1::2] << 4
    return codes.contiguous().view(torch.int32)  # the byte order of safetensors, and of every machine that runs torch
