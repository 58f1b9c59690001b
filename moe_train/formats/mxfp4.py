"""MXFP4 of the OCP microscaling specification: E2M1 numbers with an E8M0 scale for each 32 inputs.

A weight is `number * 2^(weight_scale - 127)`. Two numbers lie in a byte, the first in its lower half, as in the format
`mxfp4-pack-quantized` of compressed-tensors. The exponent is that of the largest absolute value of the group, less 2,
and one more where that value begins with 1.75 or more, which rounds to the next power of two (`generate_mx_scales`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

GROUP = 32
BIAS = 127
NUMBERS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Absolute values by the lower three bits; the fourth is the sign."""
_LARGEST_EXPONENT = 2  # 4 = 2^2 is the largest power of two in E2M1
_ROUNDS_UP = 1.75 / 2  # as a fraction of the next power of two
_LARGEST_CODE = 254  # 255 is NaN


def quantise(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Bytes uint8 [n, in / 2] and exponents uint8 [n, in / 32] of rows [n, in]."""
    import torch

    values = rows.float().unflatten(-1, (-1, GROUP))
    fraction, exponent = torch.frexp(values.abs().amax(dim=-1))  # fraction in [0.5, 1)
    scale = exponent - 1 + (fraction >= _ROUNDS_UP).int() - _LARGEST_EXPONENT + BIAS
    scale = scale.clamp_(0, _LARGEST_CODE)
    scaled = torch.ldexp(values, BIAS - scale.unsqueeze(-1)).flatten(-2)
    codes = _codes(scaled.abs()) | (scaled < 0).to(torch.uint8) << 3
    return codes[:, 0::2] | codes[:, 1::2] << 4, scale.to(torch.uint8)


def _codes(sizes: Tensor) -> Tensor:
    """Positions in NUMBERS of the nearest ones; a tie goes to the even position."""
    import torch

    sizes = sizes.clamp(max=NUMBERS[-1])
    step = torch.where(sizes < 2, 0.5, torch.where(sizes < 4, 1.0, 2.0))
    nearest = (sizes / step).round_().mul_(step)
    codes = torch.where(nearest <= 2, 2 * nearest, torch.where(nearest <= 4, nearest + 2, 7.0))
    return codes.to(torch.uint8)


def dequantise(packed: Tensor, scale: Tensor) -> Tensor:
    """Rows [n, in] in bf16."""
    import torch

    numbers = torch.tensor([*NUMBERS, *(-number for number in NUMBERS)])
    codes = torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)
    values = numbers[codes.int()].unflatten(-1, (scale.shape[1], GROUP))
    return torch.ldexp(values, scale.int().unsqueeze(-1) - BIAS).flatten(-2).bfloat16()
