"""Block FP8 against its definition, written out here number by number."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from moe_train.formats import block_fp8, dcp
from tests.conversion import tiny_v3
from tests.conversion.tiny_v3 import Command, Tensors, same_bits

E4M3, BF16 = torch.float8_e4m3fn, torch.bfloat16


def decode(byte: int) -> float:
    """The number that an E4M3 byte stands for (OCP OFP8: no infinity, S.1111.111 is NaN)."""
    sign, exponent, mantissa = -1.0 if byte & 0x80 else 1.0, byte >> 3 & 15, byte & 7
    if byte & 0x7F == 0x7F:
        return math.nan
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


NUMBERS = np.array([decode(byte) for byte in range(256)], dtype=np.float32)
_POSITIVE = NUMBERS[:0x7F].astype(np.float64)  # rising


def encode(value: float) -> int:
    """The nearest E4M3 byte, ties to even, saturating."""
    if math.isnan(value):
        return 0x7F
    size = min(abs(value), 448.0)
    above = int(np.searchsorted(_POSITIVE, size))
    below = max(0, above - 1) if above < len(_POSITIVE) and _POSITIVE[above] != size else above
    low, high = size - _POSITIVE[below], _POSITIVE[above] - size
    nearest = below if low < high or (low == high and below % 2 == 0) else above
    return nearest | (0x80 if math.copysign(1.0, value) < 0 else 0)


def reference_scale(block: np.ndarray, largest: float, power_of_two: bool) -> np.float32:
    """Scale of a block by the published rule, in float32. As a power of two it is doubled where the largest number
    would become 224: that is 448 of the doubled scale."""
    amax = np.float32(np.abs(block).max())
    if amax == 0 or not np.isfinite(amax):
        return np.float32(1)
    with np.errstate(over="ignore"):
        scale = np.float32(448) / amax
    scale = np.float32(largest) if np.isinf(scale) else scale
    if power_of_two:
        scale = np.float32(2.0 ** (math.frexp(float(scale))[1] - 1))
        if NUMBERS[encode(float(amax * scale))] == 224:
            scale *= np.float32(2)
    return scale


def reference(weight: Tensor, power_of_two: bool) -> tuple[np.ndarray, np.ndarray]:
    """FP8 bytes and weight_scale_inv, block by block and number by number."""
    values, largest = weight.float().numpy(), torch.finfo(weight.dtype).max
    rows, columns = values.shape
    quantised = np.zeros(values.shape, dtype=np.uint8)
    inverse = np.zeros((math.ceil(rows / 128), math.ceil(columns / 128)), dtype=np.float32)
    for i in range(inverse.shape[0]):
        for j in range(inverse.shape[1]):
            where = np.s_[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128]
            scale = reference_scale(values[where], largest, power_of_two)
            with np.errstate(over="ignore"):
                scaled = values[where] * scale
            quantised[where] = np.vectorize(encode, otypes=[np.uint8])(scaled)
            inverse[i, j] = np.float32(1) / scale
    return quantised, inverse


def dequantised(quantised: Tensor, inverse: Tensor) -> Tensor:
    """What an FP8 weight stands for in bf16: each number times its block's scale, in float32, then rounded once."""
    codes, scales = quantised.view(torch.uint8).numpy(), inverse.numpy()
    rows, columns = np.indices(codes.shape)
    return torch.from_numpy(NUMBERS[codes] * scales[rows // 128, columns // 128]).to(BF16)


def block(fill: float, dtype: torch.dtype = BF16) -> Tensor:
    """A ragged weight of ordinary numbers, with `fill` in its second block."""
    weight = torch.randn((150, 200), generator=torch.Generator().manual_seed(7)).to(dtype)
    weight[3, 130] = fill
    return weight


TINY, HUGE = 1e-39, 3.3e38
ADVERSARIAL = {
    "ordinary": block(0.5),
    "zeros": torch.zeros(130, 257, dtype=BF16),
    "minus zero": -torch.zeros(5, 5, dtype=BF16),
    "tiny": block(0.5).mul(0).add(TINY).to(BF16),
    "tiny fp32": torch.full((9, 140), 1e-42),
    "huge": block(HUGE),
    "largest fp32": block(torch.finfo(torch.float32).max, torch.float32),
    "inf": block(math.inf),
    "nan": block(math.nan),
    "inf and nan": block(math.inf).index_put((torch.tensor(4), torch.tensor(131)), torch.tensor(math.nan, dtype=BF16)),
    "448": block(448.0),
    "ties": torch.arange(-600, 600, dtype=torch.float32).view(30, 40) / 16,
    "one number": torch.full((1, 1), 0.3, dtype=BF16),
    "fp16": block(0.25, torch.float16),
}


@pytest.mark.parametrize("name", ADVERSARIAL)
@pytest.mark.parametrize("power_of_two", [True, False])
def test_bytes_and_scales_are_those_of_the_published_rule(name: str, power_of_two: bool) -> None:
    weight = ADVERSARIAL[name]
    quantised, inverse = block_fp8.quantise(weight, power_of_two)
    codes, scales = reference(weight, power_of_two)
    found = quantised.view(torch.uint8).numpy()
    nan = np.isnan(NUMBERS[codes])
    assert np.array_equal(np.isnan(NUMBERS[found]), nan)
    assert np.array_equal(found[~nan], codes[~nan])
    assert inverse.numpy().tobytes() == scales.tobytes()


@pytest.mark.parametrize("name", sorted(ADVERSARIAL.keys() - {"huge", "largest fp32"}))
def test_quantising_again_changes_nothing_with_powers_of_two(name: str) -> None:
    """But for numbers within 6 % of the largest fp32, which round to 256 x 2^120: beyond it."""
    once = block_fp8.dequantise(*block_fp8.quantise(ADVERSARIAL[name]), dtype=torch.float32)
    twice = block_fp8.dequantise(*block_fp8.quantise(once), dtype=torch.float32)
    assert torch.equal(once.isnan(), twice.isnan())
    assert torch.equal(once.nan_to_num(), twice.nan_to_num())


def test_quantising_again_in_bf16_changes_nothing_with_powers_of_two() -> None:
    """An FP8 number has four significant bits, so bf16 loses none of it between the two times."""
    for seed in range(0, 20, 3):
        generator = torch.Generator().manual_seed(seed)
        weight = (torch.randn((200, 300), generator=generator) * 10.0 ** (seed - 10)).to(BF16)
        once = block_fp8.dequantise(*block_fp8.quantise(weight))
        assert same_bits(once, block_fp8.dequantise(*block_fp8.quantise(once)))


def test_bf16_from_fp8_is_the_same_fp8_again() -> None:
    """Bytes and scales, where the scale is a power of two; 8 % of blocks of ordinary numbers had others before."""
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn((400, 520), generator=generator) * 10.0 ** (seed - 6)
        for dtype in (torch.float32, BF16):
            codes, inverse = block_fp8.quantise(weight.to(dtype))
            again, inverse_again = block_fp8.quantise(block_fp8.dequantise(codes, inverse))
            assert same_bits(again, codes)
            assert same_bits(inverse_again, inverse)


def test_a_largest_number_just_above_224_uses_the_whole_range() -> None:
    """It is 224 of one scale and 448 of half of it, and the smaller numbers of the block are finer with that."""
    weight = torch.tensor([[224.3, 1.0, 2.0**-9 * 1.5]])
    codes, inverse = block_fp8.quantise(weight)
    assert inverse.item() == 0.5
    assert block_fp8.dequantise(codes, inverse, dtype=torch.float32).tolist() == [[224.0, 1.0, 2.0**-9 * 1.5]]


@pytest.mark.parametrize("kind", ["bf16 weights", "fp32 weights", "powers of two", "any scale"])
def test_fp8_with_fp32_scales_comes_back(kind: str) -> None:
    """The bytes always, and numbers that are the same in bf16. The scale itself where it was made of bf16 weights or is
    a power of two: of others bf16 keeps less than they have."""
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn((200, 300), generator=generator)
        weight = weight.to(BF16) if kind == "bf16 weights" else weight
        codes, inverse = block_fp8.quantise(weight, power_of_two=kind == "powers of two")
        if kind == "any scale":
            inverse = inverse * torch.exp2(torch.rand(inverse.shape, generator=generator))
        once = block_fp8.dequantise(codes, inverse)
        again, inverse_again = block_fp8.quantise(once, power_of_two=False)
        assert same_bits(again, codes)
        assert same_bits(block_fp8.dequantise(again, inverse_again), once)
        torch.testing.assert_close(inverse_again, inverse, rtol=2**-8, atol=0)
        if kind in ("bf16 weights", "powers of two"):
            assert same_bits(inverse_again, inverse)


def test_quantising_again_with_fp32_scales_changes_nothing_once_the_weights_are_bf16() -> None:
    """bf16 rounds what an fp32 scale makes, and a scale that gives just those numbers is found again."""
    for seed in range(8):
        weight = torch.randn((200, 300), generator=torch.Generator().manual_seed(seed))
        codes, inverse = block_fp8.quantise(weight, power_of_two=False)
        once = block_fp8.dequantise(codes, inverse)
        codes_again, inverse_again = block_fp8.quantise(once, power_of_two=False)
        twice = block_fp8.dequantise(codes_again, inverse_again)
        assert same_bits(codes_again, codes)
        torch.testing.assert_close(inverse_again, inverse, rtol=2**-8, atol=0)
        assert same_bits(twice, once)
        assert same_bits(block_fp8.dequantise(*block_fp8.quantise(twice, power_of_two=False)), twice)
        of_bf16 = block_fp8.dequantise(*block_fp8.quantise(weight.to(BF16), power_of_two=False))
        assert same_bits(block_fp8.dequantise(*block_fp8.quantise(of_bf16, power_of_two=False)), of_bf16)


@pytest.mark.parametrize("start", [0, 1, 127, 128, 129, 255, 256])
def test_any_rows_are_dequantised_with_their_own_scales(start: int) -> None:
    weight = (
        torch.randn((300, 200), generator=torch.Generator().manual_seed(start)) * torch.logspace(-3, 3, 300)[:, None]
    )
    codes, inverse = block_fp8.quantise(weight, power_of_two=False)
    rows = block_fp8.dequantise(codes[start : start + 40], inverse, first_row=start)
    assert same_bits(rows, dequantised(codes, inverse)[start : start + 40])


def release(seed: int, power_of_two: bool) -> Tensors:
    """Weights in the form of the release, with random FP8 numbers and scales."""
    tensors, generator = tiny_v3.weights(seed), torch.Generator().manual_seed(seed)
    for name in tiny_v3.quantised(list(tensors)):
        shape = tensors[name].shape
        codes = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        codes[codes & 0x7F == 0x7F] = 0  # no NaN
        grid = (math.ceil(shape[0] / 128), math.ceil(shape[1] / 128))
        exponents = torch.randint(-14, -6, grid, generator=generator).float()
        scales = torch.exp2(exponents if power_of_two else exponents + torch.rand(grid, generator=generator))
        tensors[name], tensors[f"{name}_scale_inv"] = codes.view(E4M3), scales
    return tensors


def meaning(tensors: Tensors) -> Tensors:
    """The same weights in bf16, by definition."""
    return {
        name: dequantised(t, tensors[f"{name}_scale_inv"]) if t.dtype is E4M3 else t
        for name, t in tensors.items()
        if not name.endswith("_scale_inv")
    }


def megatron_tensor(checkpoint: dcp.Checkpoint, key: str, index: int | None = None) -> Tensor:
    size = checkpoint.tensors[key].size
    return checkpoint.read(key, index, 0, size[0 if index is None else 1]).tensor()


@pytest.mark.parametrize("power_of_two", [True, False])
def test_a_release_in_fp8_becomes_what_it_stands_for(power_of_two: bool, tmp_path: Path, convert: Command) -> None:
    """Straight in the Megatron checkpoint, and in the bf16 files that come back from it."""
    tensors = release(3, power_of_two)
    source = tiny_v3.write(tmp_path / "hf", tensors, files=3, quantization_config={"quant_method": "fp8"})
    expected = meaning(tensors)
    convert.well(source, tmp_path / "megatron")
    checkpoint = dcp.Checkpoint(tmp_path / "megatron")
    key = "decoder.layers.1.mlp.experts.experts.linear_fc1.weight"
    for expert in range(tiny_v3.EXPERTS):
        parts = [expected[f"model.layers.1.mlp.experts.{expert}.{part}_proj.weight"] for part in ("gate", "up")]
        assert same_bits(megatron_tensor(checkpoint, key, expert), torch.cat(parts))
    q_down = megatron_tensor(checkpoint, "decoder.layers.0.self_attention.linear_q_down_proj.weight")
    assert same_bits(q_down, expected["model.layers.0.self_attn.q_a_proj.weight"])
    bias = megatron_tensor(checkpoint, "decoder.layers.1.mlp.router.expert_bias")
    assert same_bits(bias, expected["model.layers.1.mlp.gate.e_score_correction_bias"])
    convert.well(tmp_path / "megatron", tmp_path / "back")
    back = tiny_v3.read(tmp_path / "back")
    assert back.keys() == expected.keys()
    assert [name for name in back if not same_bits(back[name], expected[name])] == []
    assert "quantization_config" not in json.loads((tmp_path / "back" / "config.json").read_text())


def test_exported_fp8_has_the_tensors_of_the_release_and_its_numbers(tmp_path: Path, convert: Command) -> None:
    """bf16 -> FP8 -> bf16 -> FP8, in Hugging Face and through Megatron: quantised once, it stays as it is."""
    weights = tiny_v3.weights(4)
    source = tiny_v3.write(tmp_path / "bf16", weights)
    convert.well(source, tmp_path / "fp8", "convert.to=hf", "convert.dtype=fp8")
    found = tiny_v3.read(tmp_path / "fp8")
    names = tiny_v3.quantised(list(weights))
    assert len(names) == 3 * 5 + 3 + 2 * 3 * (tiny_v3.EXPERTS + 1)
    assert sorted(name for name, t in found.items() if t.dtype is E4M3) == sorted(names)
    assert found.keys() == weights.keys() | {f"{name}_scale_inv" for name in names}
    for name, tensor in weights.items():
        if name in names[::7]:  # the reference is slow
            codes, scales = reference(tensor, power_of_two=True)
            assert found[name].view(torch.uint8).numpy().tobytes() == codes.tobytes(), name
            assert found[f"{name}_scale_inv"].numpy().tobytes() == scales.tobytes(), name
        elif name not in names:
            assert same_bits(found[name], tensor), name
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    assert config["quantization_config"] == {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
    }  # fmt: skip
    assert config["torch_dtype"] == "bfloat16"
    convert.well(tmp_path / "fp8", tmp_path / "again", "convert.to=hf", "convert.dtype=bf16")
    convert.well(tmp_path / "again", tmp_path / "megatron")
    convert.well(tmp_path / "megatron", tmp_path / "fp8-again", "convert.dtype=fp8")
    again, twice = tiny_v3.read(tmp_path / "again"), tiny_v3.read(tmp_path / "fp8-again")
    expected = meaning(found)
    assert [name for name in expected if not same_bits(again[name], expected[name])] == []
    assert [name for name in found if not same_bits(twice[name], found[name])] == []


def test_fp32_scales_are_written_on_request(tmp_path: Path, convert: Command) -> None:
    weights = tiny_v3.weights(5)
    source = tiny_v3.write(tmp_path / "bf16", weights)
    convert.well(source, tmp_path / "fp8", "convert.to=hf", "convert.dtype=fp8", "convert.power_of_two_scales=false")
    found = tiny_v3.read(tmp_path / "fp8")
    name = "model.layers.0.mlp.up_proj.weight"
    codes, scales = reference(weights[name], power_of_two=False)
    assert found[name].view(torch.uint8).numpy().tobytes() == codes.tobytes()
    assert found[f"{name}_scale_inv"].numpy().tobytes() == scales.tobytes()
