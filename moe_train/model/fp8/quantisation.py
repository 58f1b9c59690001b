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
_EXPONENT = 0x7F800000  # of float32
_SHAPE = {E4M3: (3, -6), E5M2: (2, -14)}  # bits of the mantissa, smallest exponent that has all of them


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
        tiles = in_tiles(self.data.float(), self.tile)
        return whole(tiles.mul_(self.scale_inv[..., :, None, :, None]), self.data.shape).to(dtype)


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
    return torch.clamp(x, -LARGEST[dtype], LARGEST[dtype]).to(dtype)


def round_values(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`round_to` as fp32, five times as fast on a CPU as the casts there and back; but an infinity stays one.

    Hardware makes a finite number of it without a word. In an emulation, a run that diverges had better show it.
    Adding a number whose last bit is worth as much as the last bit that FP8 keeps of `x`, and subtracting it again,
    leaves `x` rounded to nearest even. A zero may lose its sign.
    """
    mantissa_bits, smallest_exponent = _SHAPE[dtype]
    infinite = x.isinf()
    finite = torch.clamp(x, -LARGEST[dtype], LARGEST[dtype])
    exponent = (finite.view(torch.int32) & _EXPONENT).clamp_(min=(smallest_exponent + 127) << 23)
    shift = exponent.add_((23 - mantissa_bits) << 23 | 1 << 22).view(torch.float32)  # 1.5 x 2^(exponent + shift)
    result = torch.add(finite, shift).sub_(shift)
    return torch.where(infinite, x, result) if infinite.any() else result


def quantise(
    x: Tensor, tile: tuple[int, int], *, dtype: torch.dtype = E4M3, power_of_two: bool = True, mx: bool = False
) -> Quantised:
    """Each tile of `x` [..., rows, columns] with a scale of its own. `mx` gives E8M0 scales."""
    tile = _fitting(tile, x)
    tiles, inverse = _scaled(x, tile, dtype, power_of_two, mx)
    return Quantised(whole(round_to(tiles, dtype), x.shape).contiguous(), inverse, tile)


def rounded(
    x: Tensor,
    tile: tuple[int, int],
    result: torch.dtype,
    *,
    dtype: torch.dtype = E4M3,
    power_of_two: bool = True,
    mx: bool = False,
) -> Tensor:
    """`quantise(...).dequantise(result)`, without the bytes in between, and with infinities unchanged."""
    if x.dim() > 2:  # one matrix at a time stays in the cache
        matrices = [rounded(m, tile, result, dtype=dtype, power_of_two=power_of_two, mx=mx) for m in x]
        return torch.stack(matrices)
    tiles, inverse = _scaled(x, _fitting(tile, x), dtype, power_of_two, mx)
    values = round_values(tiles, dtype).mul_(inverse[..., :, None, :, None])
    return whole(values.to(result), x.shape)


def _fitting(tile: tuple[int, int], x: Tensor) -> tuple[int, int]:
    """No tile is larger than the whole."""
    *_, rows, columns = x.shape
    return min(tile[0], max(rows, 1)), min(tile[1], max(columns, 1))


def _scaled(
    x: Tensor, tile: tuple[int, int], dtype: torch.dtype, power_of_two: bool, mx: bool
) -> tuple[Tensor, Tensor]:
    """Tiles of `x` in fp32 times their scales, and the inverse scales."""
    tiles = in_tiles(x.float(), tile)
    amax = tiles.abs().amax(dim=(-3, -1))
    if mx:
        scale, inverse = mx_scale_of(amax, LARGEST[dtype])
    else:
        scale = scale_of(amax, LARGEST[dtype], x.dtype, power_of_two)
        inverse = 1.0 / scale
    return tiles * scale[..., :, None, :, None], inverse


def in_tiles(x: Tensor, tile: tuple[int, int]) -> Tensor:
    """[..., rows, columns] -> [..., tiles, rows of a tile, tiles, columns of a tile], filled up with zeros."""
    (r, c), (rows, columns) = tile, x.shape[-2:]
    if rows % r or columns % c:
        x = F.pad(x, (0, -columns % c, 0, -rows % r))
    return x.reshape(*x.shape[:-2], -(-rows // r), r, -(-columns // c), c)


def whole(tiles: Tensor, shape: torch.Size) -> Tensor:
    """The reverse of `in_tiles`."""
    return tiles.flatten(-2).flatten(-3, -2)[..., : shape[-2], : shape[-1]]
