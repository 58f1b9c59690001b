"""MXFP4 weights: the bytes and the numbers of compressed-tensors, and the nearest ones."""

from __future__ import annotations

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams

from moe_train.formats import mxfp4
from tests.conversion.tiny_v3 import same_bits

SCHEME: QuantizationScheme = preset_name_to_scheme("MXFP4A16", ["Linear"])
COMPRESSOR = BaseCompressor.get_value_from_registry("mxfp4-pack-quantized")


def weight() -> torch.Tensor:
    """Numbers of many sizes, a group of zeros, and groups that begin with each kind of largest number."""
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(16, 64, generator=generator) * 2.0 ** torch.randint(-20, 20, (16, 1), generator=generator)
    values[0] = 0
    values[1] = values[1].clamp(-1, 1)
    for row, largest in enumerate((1.0, 1.7421875, 1.75, 1.7578125, 1.99, 2.0), 2):
        values[row] = values[row].sign() * 0.4
        values[row, 3] = largest
    return values.bfloat16()


def test_bytes_and_exponents_are_those_of_compressed_tensors() -> None:
    values = weight()
    packed, scale = mxfp4.quantise(values)
    groups = values[1:].unflatten(-1, (2, 32))
    expected, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), SCHEME.weights)
    factors = torch.ldexp(torch.ones(scale.shape), scale.int() - 127)
    assert torch.equal(factors[1:], 2.0 ** (expected.float() - 127)) or torch.equal(factors[1:], expected.float())
    theirs = COMPRESSOR.compress({"weight": values.float(), "weight_scale": factors}, SCHEME)
    assert same_bits(packed, theirs["weight_packed"])
    assert same_bits(scale, theirs["weight_scale"])
    meaning = COMPRESSOR.decompress({"weight_packed": packed, "weight_scale": scale}, SCHEME)["weight"]
    assert same_bits(mxfp4.dequantise(packed, scale), meaning)


def test_every_number_is_the_nearest_and_a_tie_is_even() -> None:
    values = torch.zeros(1, 64)
    values[0, :32] = torch.tensor([4.0, *(i / 16 for i in range(31))])  # scale 1: 0 to 1.875
    values[0, 32:] = torch.tensor([4.0, *(2 + i / 8 for i in range(31))])  # 2 to 5.75
    packed, scale = mxfp4.quantise(values)
    assert scale.tolist() == [[127, 127]]
    found = mxfp4.dequantise(packed, scale).float()
    numbers = torch.tensor(mxfp4.NUMBERS)
    gaps = (values[0, :, None] - numbers).abs()
    assert torch.equal((found - values).abs()[0], gaps.amin(dim=1))
    ties = {0.25: 0.0, 0.75: 1.0, 1.25: 1.0, 1.75: 2.0, 2.5: 2.0, 3.5: 4.0, 5.0: 4.0}
    for value, even in ties.items():
        assert set(found[values == value].tolist()) == {even}


def test_quantised_numbers_stay() -> None:
    once = mxfp4.dequantise(*mxfp4.quantise(weight()))
    assert torch.equal(mxfp4.dequantise(*mxfp4.quantise(once)), once)


def test_exponents_end_where_bytes_do() -> None:
    values = torch.full((2, 32), 1e-45)
    values[1] = 1e38
    packed, scale = mxfp4.quantise(values)
    assert scale[:, 0].tolist() == [0, 124 + 127]
    assert set(mxfp4.dequantise(packed, scale)[1].tolist()) == {2.0**126}
