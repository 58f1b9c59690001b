"""Block FP8 of DeepSeek-V3's releases: E4M3 with one scale for each 128 x 128 block of a weight.

A weight is `fp8 * weight_scale_inv`. Quantising follows the published rule (arXiv 2412.19437, section 3.3), which
training shares: moe_train/model/fp8.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_train.checkpoint.dtypes import DTYPES

if TYPE_CHECKING:  # the names and shapes are wanted where nothing is computed
    import torch
    from torch import Tensor

DTYPE = DTYPES["float8_e4m3fn"]
BLOCK = 128
SUFFIX = "_scale_inv"


def scale_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Shape of `weight_scale_inv` of a weight [out, in]."""
    return -(-shape[0] // BLOCK), -(-shape[1] // BLOCK)


def dequantise(quantised: Tensor, scale_inv: Tensor, first_row: int = 0, dtype: torch.dtype | None = None) -> Tensor:
    """Rows of a weight from its FP8 rows [n, in], which begin at `first_row`, and all its scales [blocks, blocks].

    They are bf16 where no `dtype` is given.
    """
    rows, columns = quantised.shape
    first, last = first_row // BLOCK, -(-(first_row + rows) // BLOCK)
    scales = scale_inv[first:last].float().repeat_interleave(BLOCK, dim=0)[first_row - first * BLOCK :][:rows]
    values = quantised.float()
    for block in range(scale_inv.shape[1]):
        columns_of_block = slice(block * BLOCK, min((block + 1) * BLOCK, columns))
        values[:, columns_of_block] *= scales[:, block : block + 1]
    return values.bfloat16() if dtype is None else values.to(dtype)


def quantise(weight: Tensor, power_of_two: bool = True) -> tuple[Tensor, Tensor]:
    """FP8 weight [out, in] and `weight_scale_inv`. `weight` begins at a multiple of 128 rows of the whole."""
    from moe_train.model import fp8

    quantised = fp8.quantise(weight, (BLOCK, BLOCK), power_of_two=power_of_two)
    return quantised.data, quantised.scale_inv
