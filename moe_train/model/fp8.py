"""FP8 numbers: which scale a tile gets, and how a tensor is rounded to it. Plain torch, for training and for files.

The rules are those of Transformer Engine (its transformer_engine/common/recipe and the kernels behind it): E4M3 or
E5M2, saturating, rounded to nearest even, always from the high-precision tensor.

- block (DeepSeek-V3, arXiv 2412.19437, section 3.3.2): tiles of 1 x 128 along the contraction, 128 x 128 for weights;
- tensor: one scale from the tensor's own largest value; delayed: one from those of earlier passes (`DelayedScale`);
- mxfp8: tiles of 1 x 32 along the contraction, with an E8M0 scale (a power of two, rounded so that nothing saturates).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LARGEST = {E4M3: 448.0, E5M2: 57344.0}
BLOCK = 128
MX_BLOCK = 32
_EXPONENT = 0x7F800000  # of float32


@dataclass(frozen=True)
class Quantised:
    """`data * scale_inv`, where each tile of `data` has its own scale.

    Args:
        data: [..., rows, columns] in FP8.
        scale_inv: fp32 [..., tiles of rows, tiles of columns].
        tile: rows and columns of a tile; those at the end may be cut off.
    """

    data: Tensor
    scale_inv: Tensor
    tile: tuple[int, int]

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        """The values, [..., rows, columns]. Exact in fp32, and in bf16 where scales are powers of two."""
        *_, rows, columns = self.data.shape
        tiles = _in_tiles(self.data.float(), self.tile)
        values = tiles.mul_(self.scale_inv[..., :, None, :, None])
        return values.flatten(-2).flatten(-3, -2)[..., :rows, :columns].to(dtype)


def scale_of(amax: Tensor, largest: float, dtype: torch.dtype, power_of_two: bool) -> Tensor:
    """What to multiply values by, from the largest of their magnitudes: fp32, shape of `amax`.

    448 / amax by true division; 1 where amax is 0, inf or nan; the largest number of `dtype`, the format of the values,
    where the quotient overflows; cut to a power of two if asked.
    """
    amax = amax.float()
    scale = torch.div(torch.tensor(largest, device=amax.device), amax)  # a Python number would multiply by 1 / amax
    scale = torch.where(torch.isinf(scale), torch.tensor(torch.finfo(dtype).max, device=amax.device), scale)
    scale = torch.where((amax == 0) | ~torch.isfinite(amax), torch.ones_like(scale), scale)
    if power_of_two:
        scale = (scale.view(torch.int32) & _EXPONENT).view(torch.float32)
    return scale


def mx_scale_of(amax: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    """Scale and its inverse of E8M0, both fp32: the inverse is amax / largest rounded up to a power of two, from 2^-127
    to 2^127; NaN where amax is not a number."""
    quotient = amax.float() * torch.div(torch.ones((), device=amax.device), largest)
    bits = quotient.view(torch.int32)
    exponent, mantissa = bits >> 23, bits & 0x7FFFFF
    stays = (mantissa == 0) | (exponent == 0xFE) | ((exponent == 0) & (mantissa <= 0x400000))
    exponent = torch.where(stays, exponent, exponent + 1).clamp(max=0xFE) - 127
    exponent = exponent.masked_fill(quotient == 0, 0)  # a tile of zeros: any scale gives zeros
    inverse = torch.ldexp(torch.ones_like(quotient), exponent).masked_fill(torch.isnan(amax), torch.nan)
    return torch.ldexp(torch.ones_like(quotient), -exponent).masked_fill(torch.isnan(amax), torch.nan), inverse


def round_to(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` (fp32) in FP8, saturating: torch's cast to E5M2 alone would give infinities."""
    return x.clamp(-LARGEST[dtype], LARGEST[dtype]).to(dtype)


def quantise(
    x: Tensor, tile: tuple[int, int], *, dtype: torch.dtype = E4M3, power_of_two: bool = True, mx: bool = False
) -> Quantised:
    """Each tile of `x` [..., rows, columns] with a scale of its own. `mx` gives E8M0 scales."""
    *_, rows, columns = x.shape
    tile = min(tile[0], max(rows, 1)), min(tile[1], max(columns, 1))  # no tile is larger than the whole
    tiles = _in_tiles(x.float(), tile)
    amax = tiles.abs().amax(dim=(-3, -1))
    if mx:
        scale, inverse = mx_scale_of(amax, LARGEST[dtype])
    else:
        scale = scale_of(amax, LARGEST[dtype], x.dtype, power_of_two)
        inverse = 1.0 / scale
    data = round_to(tiles * scale[..., :, None, :, None], dtype)
    data = data.flatten(-2).flatten(-3, -2)[..., :rows, :columns].contiguous()
    return Quantised(data, inverse, tile)


def _in_tiles(x: Tensor, tile: tuple[int, int]) -> Tensor:
    """[..., rows, columns] -> [..., tiles, rows of a tile, tiles, columns of a tile], filled up with zeros."""
    (r, c), (rows, columns) = tile, x.shape[-2:]
    if rows % r or columns % c:
        x = F.pad(x, (0, -columns % c, 0, -rows % r))
    return x.reshape(*x.shape[:-2], -(-rows // r), r, -(-columns // c), c)
