"""Block FP8 of DeepSeek-V3's releases: E4M3 with one scale for each 128 x 128 block of a weight.

A weight is `fp8 * weight_scale_inv`. Quantising follows the published rule (arXiv 2412.19437, section 3.3), which
training shares (moe_train/model/fp8/quantisation.py), but for what makes the way FP8 -> bf16 -> FP8 an identity.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_train.formats.dtypes import DTYPES

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
    """FP8 weight [out, in] and `weight_scale_inv`. `weight` begins at a multiple of 128 rows of the whole.

    Values that came from FP8 become the same FP8 numbers again. With powers of two the scale is chosen from the largest
    number as E4M3 holds it; else a search finds a scale that gives exactly the bf16 numbers of a block.
    """
    from moe_train.model.fp8 import quantisation

    quantised = quantisation.quantise(weight, (BLOCK, BLOCK), power_of_two=power_of_two)
    if power_of_two:
        return _full_range(weight, quantised.data, quantised.scale_inv)
    if weight.dtype is DTYPES["bfloat16"].torch:
        return _as_before(weight, quantised.data, quantised.scale_inv)
    return quantised.data, quantised.scale_inv


def _full_range(weight: Tensor, data: Tensor, scale_inv: Tensor) -> tuple[Tensor, Tensor]:
    """With half the scale where the largest number of a block has become 224.

    It was a little more before, and then 448 with half the scale is the nearest number too. The value of 224
    would get that scale when it is quantised again: so the first time has to choose it as well.
    """
    import torch

    from moe_train.model.fp8 import quantisation

    largest = quantisation.LARGEST[quantisation.E4M3]
    half = quantisation.in_tiles(data.float(), _tile(weight)).abs().amax(dim=(-3, -1)) == largest / 2
    if not half.any():
        return data, scale_inv
    halved = torch.where(half, scale_inv / 2, scale_inv)
    scaled = quantisation.in_tiles(weight.float(), _tile(weight)) / halved[:, None, :, None]  # powers of two: exact
    finer = quantisation.whole(quantisation.round_to(scaled, quantisation.E4M3), weight.shape).contiguous()
    return finer, halved


def _as_before(weight: Tensor, data: Tensor, scale_inv: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks of bf16 numbers that came from FP8, with a scale that gives exactly them.

    bf16 rounds `fp8 * scale`, so the largest number of a block says only about what the scale was. The bytes follow
    from that; each number then bounds the scale, and any within all bounds gives the block.
    """
    import torch

    from moe_train.model.fp8 import quantisation

    tile = _tile(weight)
    values, codes = (quantisation.in_tiles(t.float(), tile) for t in (weight, data))

    def exact(codes: Tensor, scale: Tensor) -> Tensor:
        found = (codes * scale[:, None, :, None]).bfloat16().float()
        return (found == values).all(dim=-1).all(dim=-2)

    published = exact(codes, scale_inv)
    result, found = scale_inv, published
    low, high = _bounds(weight, codes, tile)
    amax = values.abs().amax(dim=(-3, -1))
    for candidate in (amax / quantisation.LARGEST[quantisation.E4M3], ((low + high) / 2).float()):
        better = ~found & exact(codes, candidate)
        result, found = torch.where(better, candidate, result), found | better
    other_data, other_scale = quantise(weight, power_of_two=True)  # what was made with powers of two
    other_codes = quantisation.in_tiles(other_data.float(), tile)
    other = exact(other_codes, other_scale) & ~published
    if other.any():
        chosen = torch.where(other[:, None, :, None], other_codes, codes)
        data = quantisation.whole(chosen, weight.shape).to(quantisation.E4M3).contiguous()
        result = torch.where(other, other_scale, result)
    return data, result


def _bounds(weight: Tensor, codes: Tensor, tile: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Smallest and largest scale of each block with which every number rounds to that of bf16, fp64."""
    import torch

    from moe_train.model.fp8 import quantisation

    bits = weight.contiguous().view(torch.int16) & 0x7FFF
    size = bits.view(torch.bfloat16).float()
    below, above = ((bits + step).clamp(min=0).view(torch.bfloat16).float() for step in (-1, 1))
    lowest, highest = (quantisation.in_tiles((size + other) / 2, tile).double() for other in (below, above))
    empty = codes == 0
    low = (lowest / codes.abs()).masked_fill(empty, 0.0).amax(dim=(-3, -1))
    high = (highest / codes.abs()).masked_fill(empty, torch.inf).amin(dim=(-3, -1))
    return low, high


def _tile(weight: Tensor) -> tuple[int, int]:
    """Rows and columns of a block; none is larger than the whole."""
    rows, columns = weight.shape
    return min(BLOCK, max(rows, 1)), min(BLOCK, max(columns, 1))
