"""Block FP8 of DeepSeek-V3's releases: E4M3 with one scale for each 128 x 128 block of a weight.

A weight is `fp8 * weight_scale_inv`. Quantising follows the published rule (arXiv 2412.19437, section 3.3; Transformer
Engine's blockwise recipe): scale = 448 / amax of the block by true division, 1 where amax is 0, inf or nan, cut to a
power of two unless `power_of_two` is off; q = E4M3(clamp(x * scale)); weight_scale_inv = 1 / scale.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128
SUFFIX = "_scale_inv"
_LARGEST = 448.0


def scale_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Shape of `weight_scale_inv` of a weight [out, in]."""
    return -(-shape[0] // BLOCK), -(-shape[1] // BLOCK)


def dequantise(quantised: Tensor, scale_inv: Tensor, first_row: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Rows of a weight from its FP8 rows [n, in], which begin at `first_row`, and all its scales [blocks, blocks]."""
    rows, columns = quantised.shape
    first, last = first_row // BLOCK, -(-(first_row + rows) // BLOCK)
    scales = scale_inv[first:last].float().repeat_interleave(BLOCK, dim=0)[first_row - first * BLOCK :][:rows]
    values = quantised.float()
    for block in range(scale_inv.shape[1]):
        columns_of_block = slice(block * BLOCK, min((block + 1) * BLOCK, columns))
        values[:, columns_of_block] *= scales[:, block : block + 1]
    return values.to(dtype)


def quantise(weight: Tensor, power_of_two: bool = True) -> tuple[Tensor, Tensor]:
    """FP8 weight [out, in] and `weight_scale_inv`. `weight` begins at a multiple of 128 rows of the whole."""
    rows, columns = weight.shape
    padded = F.pad(weight.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.view(padded.shape[0] // BLOCK, BLOCK, padded.shape[1] // BLOCK, BLOCK)
    amax = blocks.abs().amax(dim=(1, 3))
    scale = torch.div(torch.tensor(_LARGEST), amax)  # a Python number would multiply by a reciprocal
    scale = torch.where(torch.isinf(scale) & (amax > 0), torch.tensor(torch.finfo(torch.float32).max), scale)
    scale = torch.where((amax == 0) | ~torch.isfinite(amax), torch.ones(()), scale)
    if power_of_two:
        scale = (scale.view(torch.int32) & 0x7F800000).view(torch.float32)
    scaled = blocks * scale[:, None, :, None]
    quantised = scaled.clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn).view(padded.shape)[:rows, :columns]
    return quantised.contiguous(), 1.0 / scale
