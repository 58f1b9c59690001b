"""int4 and int8 weights: the bytes and the numbers of compressed-tensors."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

from moe_train.formats import packed_int
from tests.conversion.tiny_v3 import same_bits

WIDTHS = {"int4, groups of 128": (4, 128), "int4, groups of 32": (4, 32), "int8": (8, None), "int8, groups": (8, 64)}


def scheme(bits: int, group: int | None) -> QuantizationScheme:
    strategy = "channel" if group is None else "group"
    args = QuantizationArgs(num_bits=bits, type="int", strategy=strategy, group_size=group, symmetric=True)
    return QuantizationScheme(targets=["Linear"], weights=args)


def weight(rows: int, columns: int) -> torch.Tensor:
    """Numbers of many sizes, with outliers and a group of zeros."""
    generator = torch.Generator().manual_seed(rows + columns)
    values = torch.randn(rows, columns, generator=generator) * 10 ** torch.randint(-6, 3, (rows, 1)).float()
    values[0, 0], values[1, -1] = 90.0, -90.0
    values[2] = 0
    return values.bfloat16()


@pytest.mark.parametrize("name", WIDTHS)
def test_bytes_are_those_of_compressed_tensors(name: str) -> None:
    bits, group = WIDTHS[name]
    values = weight(6, 256)
    packed, scale = packed_int.quantise(values, bits, group or 256)
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    state = {"weight": values.float(), "weight_scale": scale.float()}
    theirs = compressor.compress(state, scheme(bits, group))
    assert same_bits(packed, theirs["weight_packed"])
    assert (packed.dtype, scale.dtype) == (torch.int32, torch.bfloat16)
    stored = {"weight_packed": packed, "weight_scale": scale, "weight_shape": torch.tensor(values.shape)}
    meaning = compressor.decompress(stored, scheme(bits, group))["weight"]
    assert same_bits(packed_int.dequantise(packed, scale, bits, 256), meaning)


@pytest.mark.parametrize("name", WIDTHS)
def test_every_number_is_the_nearest(name: str) -> None:
    """Within half a scale; at the end of the range within one, as a positive number has one code less."""
    bits, group = WIDTHS[name]
    values = weight(8, 256).float()
    packed, scale = packed_int.quantise(values, bits, group or 256)
    codes = packed_int.unpack(packed, bits, 256).int()
    steps = scale.float().repeat_interleave(256 // scale.shape[1], dim=1)
    error = (codes * steps - values).abs() / steps
    largest = codes == 2 ** (bits - 1) - 1
    assert error[~largest].max() <= 0.5
    assert error.max() <= 1.01  # the scale is rounded to bf16
    assert codes.abs().amax() >= 2 ** (bits - 1) - 1, "the range is used"
    assert not codes[2].any()


@pytest.mark.parametrize(("bits", "columns"), [(4, 30), (8, 30), (4, 8), (8, 7)])
def test_a_row_ends_with_a_whole_word(bits: int, columns: int) -> None:
    values = weight(3, columns)
    packed, scale = packed_int.quantise(values, bits, columns)
    assert packed.shape == (3, packed_int.columns_of(columns, bits))
    theirs = BaseCompressor.get_value_from_registry("pack-quantized").compress(
        {"weight": values.float(), "weight_scale": scale.float()}, scheme(bits, None)
    )
    assert same_bits(packed, theirs["weight_packed"])
    assert packed_int.dequantise(packed, scale, bits, columns).shape == values.shape


def test_the_scale_is_that_of_rounding_to_nearest_in_llm_compressor() -> None:
    from compressed_tensors.quantization.utils import calculate_qparams

    values = weight(6, 256).float()
    groups = values.unflatten(-1, (2, 128))
    expected, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), scheme(4, 128).weights)
    _, scale = packed_int.quantise(values, 4, 128)
    filled = groups.abs().amax(-1) > 0
    assert same_bits(scale[filled], expected.bfloat16()[filled])
