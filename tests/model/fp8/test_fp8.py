"""FP8 emulation against rules written a second time, in numpy with its own rounding: no code is shared."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_train.config.composition.compose import compose
from moe_train.config.composition.validate import validate
from moe_train.formats import block_fp8
from moe_train.model.fp8 import quantisation
from moe_train.model.fp8.delayed_scaling import DelayedScale
from moe_train.model.fp8.linear import FP8LinearKernel, Recipe
from moe_train.model.kernels import gemm
from moe_train.model.precision import emulated_recipe
from tests.distributed.helper import run_distributed
from tests.model.tiny import build_tiny

Array = NDArray[Any]
BLOCK_RECIPE = Recipe("block")


def code_values(exponent_bits: int, mantissa_bits: int) -> list[float]:
    """Every finite value above or equal to 0 of an FP8 format, in the order of its codes."""
    bias, values = 2 ** (exponent_bits - 1) - 1, []
    for code in range(128):
        exponent, mantissa = divmod(code, 2**mantissa_bits)
        fraction = mantissa / 2**mantissa_bits
        values.append(fraction * 2.0 ** (1 - bias) if exponent == 0 else (1 + fraction) * 2.0 ** (exponent - bias))
    # E4M3 has no infinity and one NaN, the last code; E5M2 keeps IEEE's last exponent for both.
    return values[:127] if mantissa_bits == 3 else values[:124]


CODES = {"e4m3": np.array(code_values(4, 3)), "e5m2": np.array(code_values(5, 2))}
FORMATS = {"e4m3": quantisation.E4M3, "e5m2": quantisation.E5M2}


def naive_bytes(values: Array, name: str) -> Array:
    """FP8 codes of float32 values: nearest, ties to the even code, saturating."""
    table, flat = CODES[name], np.abs(values.astype(np.float64)).ravel()
    above = np.clip(np.searchsorted(table, flat), 1, len(table) - 1)
    low, high = flat - table[above - 1], table[above] - flat
    codes = np.where((low < high) | ((low == high) & ((above - 1) % 2 == 0)), above - 1, above)
    codes = np.where(flat >= table[-1], len(table) - 1, codes)
    codes = np.where(np.isnan(flat), 127, codes)
    return (codes + 128 * np.signbit(values).ravel()).astype(np.uint8).reshape(values.shape)


def naive_scale(tile: Array, name: str, biggest: float, power_of_two: bool) -> np.float32:
    """Of one tile: 448 / amax, with the exceptions of the published rule."""
    with np.errstate(all="ignore"):
        amax = np.float32(np.max(np.abs(tile)))
        if amax == 0 or not np.isfinite(amax):
            return np.float32(1)
        scale = np.float32(CODES[name][-1]) / amax
    if np.isinf(scale):
        scale = np.float32(biggest)
    return np.float32(2.0 ** (math.frexp(scale)[1] - 1)) if power_of_two else scale


def naive_mx_scale(tile: Array, name: str) -> np.float32:
    """Of one tile: the largest power of two with which nothing saturates, as E8M0 has it."""
    amax = float(np.max(np.abs(tile)))
    if math.isnan(amax):
        return np.float32(math.nan)
    if math.isinf(amax):
        return np.float32(2.0**-127)
    quotient = float(np.float32(amax) * np.float32(1 / CODES[name][-1]))
    if quotient == 0:
        return np.float32(1)
    mantissa, exponent = math.frexp(quotient)
    return np.float32(2.0 ** -max(-127, exponent - 1 if mantissa == 0.5 else exponent))


def naive_quantise(
    x: Array, tile: tuple[int, int], name: str, biggest: float, power_of_two: bool, mx: bool = False
) -> tuple[Array, Array]:
    """Codes and inverse scales, one tile after another."""
    rows, columns = x.shape
    starts = [range(0, size, step) for size, step in zip(x.shape, tile, strict=True)]
    inverse = np.zeros([len(s) for s in starts], np.float32)
    codes = np.zeros(x.shape, np.uint8)
    for (i, top), (j, left) in itertools.product(*(enumerate(s) for s in starts)):
        place = slice(top, min(top + tile[0], rows)), slice(left, min(left + tile[1], columns))
        part = x[place]
        scale = naive_mx_scale(part, name) if mx else naive_scale(part, name, biggest, power_of_two)
        with np.errstate(all="ignore"):
            codes[place] = naive_bytes(part * scale, name)
            inverse[i, j] = np.float32(1) / scale
    return codes, inverse


KINDS = ["normal", "wide", "zeros", "tiny", "huge", "inf", "nan", "ties"]


def adversarial(kind: str, rows: int, columns: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    x = torch.randn(rows, columns, generator=generator)
    if kind == "wide":
        x = x * torch.exp2(torch.randint(-40, 40, x.shape, generator=generator).float())
    elif kind == "zeros":
        x[:, : columns // 2 + 1] = 0.0
        x[rows // 3 :] = -0.0
    elif kind == "tiny":
        x = x * torch.exp2(torch.randint(-148, -116, (rows, 1), generator=generator).float())
    elif kind == "huge":
        x = (x * 1e38).clamp(-3e38, 3e38)
    elif kind in ("inf", "nan"):
        chosen = torch.rand(x.shape, generator=generator) < 0.002
        x = torch.where(chosen, x.sign() * torch.tensor(float(kind)), x)
    elif kind == "ties":  # halfway between codes, with 448 present so that the scale is 1
        x = torch.tensor(np.append((CODES["e4m3"][1:] + CODES["e4m3"][:-1]) / 2, 448.0)).float()
        x = x[torch.randint(0, len(x), (rows, columns), generator=generator)]
    return x.to(dtype)


TILES = [(1, 128), (128, 1), (128, 128), (1, 32), (32, 1)]


@pytest.mark.parametrize("kind", KINDS)
def test_quantised_bytes_and_scales_are_those_of_the_published_rule(kind: str) -> None:
    """80 tensors of each kind, 640 in all, with shapes that tiles do not fill."""
    choose, generator = random.Random(kind), torch.Generator().manual_seed(KINDS.index(kind))
    for number in range(80):
        tile = TILES[number % len(TILES)]
        mx = 32 in tile
        rows, columns = choose.choice([1, 31, 128, 150]), choose.choice([1, 100, 128, 200, 260])
        dtype = choose.choice([torch.bfloat16, torch.float32])
        name, power_of_two = choose.choice(["e4m3", "e4m3", "e5m2"]), choose.random() < 0.5
        x = adversarial(kind, rows, columns, dtype, generator)
        found = quantisation.quantise(x, tile, dtype=FORMATS[name], power_of_two=power_of_two, mx=mx)
        codes, inverse = naive_quantise(x.float().numpy(), tile, name, torch.finfo(dtype).max, power_of_two or mx, mx)
        assert found.data.dtype is FORMATS[name]
        what = (number, tile, tuple(x.shape), dtype, name, power_of_two)
        ours = found.data.view(torch.uint8).numpy()
        not_numbers = np.isnan(found.data.float().numpy())  # any code of a NaN will do
        assert np.array_equal(not_numbers, np.isnan(x.float().numpy()) | np.isnan(spread(inverse, tile, x))), what
        assert np.array_equal(ours[~not_numbers], codes[~not_numbers]), what
        assert np.array_equal(found.scale_inv.numpy(), inverse, equal_nan=True), what
        values = quantisation.rounded(x, tile, torch.float32, dtype=FORMATS[name], power_of_two=power_of_two, mx=mx)
        expected = torch.where(x.isinf(), x.float(), found.dequantise(torch.float32))
        assert torch.allclose(values, expected, rtol=0, atol=0, equal_nan=True), what


def spread(inverse: Array, tile: tuple[int, int], x: Tensor) -> Array:
    """The scale of each entry of `x`."""
    whole = np.repeat(np.repeat(inverse, tile[0], axis=0), tile[1], axis=1)
    return whole[: x.size(0), : x.size(1)]


def test_rounding_of_every_float_near_a_code_is_to_nearest_even() -> None:
    """Each code, each midpoint, and the floats next to them, of both signs."""
    for name, table in CODES.items():
        points = np.concatenate([table, (table[1:] + table[:-1]) / 2]).astype(np.float32)
        around = [points, np.nextafter(points, np.float32(9e9)), np.nextafter(points, np.float32(-9e9))]
        x = np.concatenate([*around, *(-a for a in around), np.array([1e9, -1e9, np.inf], np.float32)])
        found = quantisation.round_to(torch.from_numpy(x), FORMATS[name])
        assert np.array_equal(found.view(torch.uint8).numpy(), naive_bytes(x, name)), name
        values = quantisation.round_values(torch.from_numpy(x), FORMATS[name])
        assert torch.equal(values[:-1], found.float()[:-1]), name
        assert values[-1] == math.inf


@pytest.mark.parametrize("power_of_two", [True, False])
def test_files_are_quantised_by_the_same_rule(power_of_two: bool) -> None:
    """What a converted checkpoint holds is what training multiplies with."""
    weight = adversarial("wide", 200, 300, torch.bfloat16, torch.Generator().manual_seed(3))
    data, inverse = block_fp8.quantise(weight, power_of_two)
    codes, expected = naive_quantise(
        weight.float().numpy(), (128, 128), "e4m3", torch.finfo(torch.bfloat16).max, power_of_two
    )
    assert np.array_equal(data.view(torch.uint8).numpy(), codes)
    assert np.array_equal(inverse.numpy(), expected)
    dequantised = quantisation.Quantised(data, inverse, (128, 128)).dequantise(torch.float32)
    assert torch.equal(dequantised, block_fp8.dequantise(data, inverse, dtype=torch.float32))


BIGGEST = float(np.finfo(np.float32).max)


def decoded(codes: Array, name: str) -> Array:
    """Values of FP8 codes."""
    half = np.append(CODES[name], [np.nan] * (128 - len(CODES[name])))
    values: Array = np.concatenate([half, -half])[codes]
    return values


def loop_product(
    a: Array, b: Array, a_tile: int, b_tile: int, length: int, power_of_two: bool, name: str = "e4m3"
) -> Array:
    """a b^T for a [m, k] in the format `name` and b [n, k] in E4M3: as the hardware adds up, one block of `length`
    along k after another, each with the scales of its tiles, which are `a_tile` (`b_tile`) rows high."""
    result = np.zeros((len(a), len(b)), np.float32)
    qa, sa = naive_quantise(a, (a_tile, length), name, BIGGEST, power_of_two, length == 32)
    qb, sb = naive_quantise(b, (b_tile, length), "e4m3", BIGGEST, power_of_two, length == 32)
    for block in range(-(-a.shape[1] // length)):
        columns = slice(block * length, (block + 1) * length)
        partial = decoded(qa[:, columns], name) @ decoded(qb[:, columns], "e4m3").T
        rows = np.repeat(sa[:, block], a_tile)[: len(a), None], np.repeat(sb[:, block], b_tile)[None, : len(b)]
        result += (partial.astype(np.float32) * rows[0] * rows[1]).astype(np.float32)
    return result


def tensors(tokens: int, inputs: int, outputs: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and a gradient, with entries and columns of very different size."""
    generator = torch.Generator().manual_seed(tokens + inputs)
    x, weight, grad = (
        torch.randn(shape, generator=generator) for shape in ((tokens, inputs), (outputs, inputs), (tokens, outputs))
    )
    sizes = [torch.exp2(-(5 * torch.arange(n) % 17).float()) for n in (inputs, outputs, tokens)]
    return x * sizes[0], weight * sizes[1][:, None] * sizes[0], grad * sizes[2][:, None] * sizes[1]


Named = dict[str, Array]


def fprop_dgrad_wgrad(kernel: FP8LinearKernel, shape: tuple[int, int, int], size: float = 1.0) -> tuple[Named, Named]:
    """x, weight and gradient, all `size` times as large, and the results of the kernel, by name."""
    x, weight, grad = (size * t for t in tensors(*shape))
    y = kernel.fprop(x, weight, None, True)
    found = y, *kernel.backward(grad, x, weight, None)
    given = {"x": x.numpy(), "weight": weight.numpy(), "gradient": grad.numpy()}
    return given, {name: t.numpy() for name, t in zip(("y", "gradient of x", "of the weight"), found, strict=True)}


def assert_near(found: Named, expected: Named) -> None:
    """To 1e-6 of the largest entry of each."""
    assert found.keys() == expected.keys()
    for name, reference in expected.items():
        assert np.abs(found[name] - reference).max() <= 1e-6 * np.abs(reference).max(), name


@pytest.mark.parametrize("recipe", [
    Recipe("block"), Recipe("block", power_of_two=False), Recipe("block", hybrid=True), Recipe("mxfp8"),
    Recipe("mxfp8", hybrid=True),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("shape", [(256, 384, 128), (100, 200, 300), (7, 129, 65)], ids=str)
def test_fprop_dgrad_and_wgrad_are_those_of_the_loop_over_blocks(recipe: Recipe, shape: tuple[int, int, int]) -> None:
    """Each operand has tiles along the reduction dimension of its GEMM, quantised from the input tensor."""
    given, found = fprop_dgrad_wgrad(FP8LinearKernel(recipe), shape)
    x, weight, grad = given.values()
    high, length = (128, 128) if recipe.scaling == "block" else (1, 32)
    of_grad = "e5m2" if recipe.hybrid else "e4m3"
    assert_near(found, {
        "y": loop_product(x, weight, 1, high, length, recipe.power_of_two),
        "gradient of x": loop_product(grad, weight.T, 1, high, length, recipe.power_of_two, of_grad),
        "of the weight": loop_product(grad.T, x.T, 1, 1, length, recipe.power_of_two, of_grad),
    })  # fmt: skip


@pytest.mark.parametrize("recipe", [
    Recipe("tensor", power_of_two=False), Recipe("tensor", hybrid=True, power_of_two=True),
    Recipe("delayed", power_of_two=False, history=1), Recipe("delayed", hybrid=True, power_of_two=False, history=1),
], ids=str)  # fmt: skip
def test_fprop_dgrad_and_wgrad_with_one_scale_per_tensor(recipe: Recipe) -> None:
    """Its own, or with delayed scaling that of the step before: 1 in the first, too large for the second's tensors."""
    formats = {"x": "e4m3", "weight": "e4m3", "gradient": "e5m2" if recipe.hybrid else "e4m3"}
    before, kernel = dict.fromkeys(formats, np.float32(1)), FP8LinearKernel(recipe)
    for size in (1.0, 3.0, 1e-3):
        given, found = fprop_dgrad_wgrad(kernel, (100, 200, 300), size)
        own = {name: naive_scale(given[name], formats[name], BIGGEST, recipe.power_of_two) for name in formats}
        scales = before if recipe.scaling == "delayed" else own
        x, weight, grad = (
            decoded(naive_bytes(given[name] * scales[name], form), form) / scales[name]
            for name, form in formats.items()
        )
        assert_near(found, {"y": x @ weight.T, "gradient of x": grad @ weight, "of the weight": grad.T @ x})
        before = own
        end_step(kernel)


@pytest.mark.parametrize("recipe", [Recipe("block"), Recipe("tensor"), Recipe("delayed"), Recipe("mxfp8")], ids=str)
def test_backward_is_dgrad_and_wgrad(recipe: Recipe) -> None:
    """Shared quantisation of the gradient changes no bit of either, for dense and grouped GEMMs."""
    x, weight, grad = tensors(100, 256, 96)
    together, apart = FP8LinearKernel(recipe), FP8LinearKernel(recipe)
    for _ in range(2):  # the second pass of delayed scaling has statistics
        for kernel in (together, apart):
            kernel.fprop(x, weight, None, True)
        grad_x, grad_weight = together.backward(grad, x, weight, None)
        assert torch.equal(grad_x, apart.dgrad(grad, weight, None))
        assert torch.equal(grad_weight, apart.wgrad(grad, x, None))
        end_step(together, apart)
    counts, experts = [60, 0, 40], torch.stack([weight, 2 * weight, -weight])
    grouped = FP8LinearKernel(recipe, len(counts))
    grad_x, grad_weight = grouped.backward(grad, x, experts, counts)
    assert torch.equal(grad_x, grouped.dgrad(grad, experts, counts))
    assert torch.equal(grad_weight, grouped.wgrad(grad, x, counts))


def test_a_bias_is_added_to_emulated_gemms() -> None:
    """In the precision of the output, with a gradient of its own."""
    x, weight, grad = tensors(5, 256, 3)
    bias = torch.tensor([1.0, -2.0, 3.0], requires_grad=True)
    options = {"bias": bias, "tp_group": None, "sequence_parallel": False, "allreduce_dgrad": False}
    kernel = FP8LinearKernel(BLOCK_RECIPE)
    y = gemm._forward_impl(lambda **_: torch.empty(0), x, weight.requires_grad_(), options, kernel)
    assert torch.equal(y, gemm.linear(x, weight, kernel) + bias)
    y.backward(grad)
    assert bias.grad is not None
    assert torch.allclose(bias.grad, grad.sum(0))


@pytest.mark.parametrize(("precision", "expected"), [
    ("precision=fp8_block", Recipe("block")),
    ("precision=fp8_block precision.power_of_two_scales=false", Recipe("block", power_of_two=False)),
    ("precision=fp8_block precision.fp8_dispatch=true parallel.ep=2", Recipe("block", dispatch=True)),
    ("precision=fp8_tensor", Recipe("tensor", hybrid=True, power_of_two=False)),
    ("precision=fp8_delayed precision.amax_history_len=16",
     Recipe("delayed", hybrid=True, power_of_two=False, history=16)),
    ("precision=mxfp8", Recipe("mxfp8")),
    ("precision=bf16", None),
])  # fmt: skip
def test_the_config_says_what_is_emulated(precision: str, expected: Recipe | None) -> None:
    cfg = compose(["runtime=cpu", *precision.split()])
    validate(cfg)
    assert emulated_recipe(cfg.precision) == expected


RECIPES = [
    Recipe("block"), Recipe("block", power_of_two=False), Recipe("block", hybrid=True),
    Recipe("tensor", power_of_two=False), Recipe("tensor", hybrid=True, power_of_two=True),
    Recipe("delayed", hybrid=True, power_of_two=False, history=4), Recipe("mxfp8"),
]  # fmt: skip


def end_step(*kernels: FP8LinearKernel) -> None:
    """As `delayed_scaling.update` does on one rank."""
    for scale in itertools.chain(*(p.delayed_scales for p in kernels)):
        scale.step()


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_bf16_gemms_are_the_fp32_ones_rounded_at_the_end(recipe: Recipe) -> None:
    """Values rounded to FP8 with a power of two are bf16 numbers: the faster GEMM loses nothing. Others are not."""
    x, weight, grad = (t.bfloat16() for t in tensors(256, 384, 128))
    wide = x.float(), weight.float(), grad.float()
    fast, exact = FP8LinearKernel(recipe), FP8LinearKernel(recipe)
    for _ in range(2):  # the second pass of delayed scaling has statistics
        found = fast.fprop(x, weight, None, True), *fast.backward(grad, x, weight, None)
        expected = exact.fprop(*wide[:2], None, True), *exact.backward(wide[2], *wide[:2], None)
        end_step(fast, exact)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype is torch.bfloat16
        assert (a != b.bfloat16()).float().mean() < 0.01  # sums in another order, at the edge between two numbers
        assert (a.float() - b).abs().max() <= 2**-8 * b.abs().max()


@pytest.mark.parametrize("scaling", ["block", "tensor", "delayed", "mxfp8"])
@pytest.mark.parametrize("wrong", [math.inf, -math.inf, math.nan])
def test_what_is_no_number_shows_in_the_output(scaling: str, wrong: float) -> None:
    """In the GEMM that has it, for any other values in its tile."""
    x, weight, _ = tensors(5, 256, 3)
    weight[1, 130] = wrong
    y = FP8LinearKernel(Recipe(scaling)).fprop(x + 1, weight, None, True)
    assert not y[:, 1].isfinite().any()


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found.float() - exact).norm() / exact.norm())


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_gradients_flow_and_are_near_the_exact_ones(recipe: Recipe) -> None:
    """Through autograd: off by the rounding of FP8, neither by nothing nor by much."""
    generator = torch.Generator().manual_seed(2)
    x, weight = torch.randn(64, 2, 160, generator=generator), torch.randn(96, 160, generator=generator) * 0.05
    grad = torch.randn(64, 2, 96, generator=generator)
    kernel = FP8LinearKernel(recipe)
    for _ in range(2):  # the second pass of delayed scaling has statistics
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        y = gemm.linear(*leaves, kernel)
        y.backward(grad)
        end_step(kernel)
    exact = x @ weight.T, grad @ weight, torch.einsum("sbo,sbi->oi", grad, x)
    for found, reference in zip((y.detach(), leaves[0].grad, leaves[1].grad), exact, strict=True):
        assert found is not None
        assert 5e-3 < relative(found, reference) < 8e-2


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_experts_are_quantised_separately(recipe: Recipe) -> None:
    """Neither a tile nor a scale reaches from one expert into the next."""
    counts = [0, 3, 130, 1, 0, 40]
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(sum(counts), 140, generator=generator) * torch.rand(sum(counts), 1, generator=generator) * 50
    weight, grad = torch.randn(6, 72, 140, generator=generator), torch.randn(sum(counts), 72, generator=generator)
    together, alone = FP8LinearKernel(recipe, len(counts)), [FP8LinearKernel(recipe) for _ in counts]
    for _ in range(2):
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        y = gemm.GroupedLinear.apply(*leaves, counts, together, True)
        y.backward(grad)
        start = 0
        for expert, count in enumerate(counts):
            if not count:
                assert leaves[1].grad[expert].abs().max() == 0
                alone[expert].fprop(x[:0], weight[expert], None, True)  # so that it has seen its weight too
                alone[expert].gradient.scale(grad[:0], None, True)
                continue
            rows, matrix = slice(start, start + count), weight[expert]
            one = alone[expert].fprop(x[rows], matrix, None, True)
            grads = alone[expert].backward(grad[rows], x[rows], matrix, None)
            for found, expected in zip(
                (y[rows], leaves[0].grad[rows], leaves[1].grad[expert]), (one, *grads), strict=True
            ):
                assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()
            start += count
        end_step(together, *alone)


def naive_delayed(steps: list[list[float]], length: int, largest: float) -> list[float]:
    """The scale in each step, from the largest values of each micro-batch of the steps, tensor by tensor in Python."""
    history, scale, used = [0.0] * length, 1.0, []
    for amaxes in steps:
        used.append(scale)
        latest = max([a for a in amaxes if not math.isnan(a)], default=0.0)
        if latest > 0:
            history = [latest, *history[:-1]]
        most = max(history)
        if 0 < most < math.inf:
            scale = min(float(np.float32(largest) / np.float32(most)), float(np.finfo(np.float32).max))
    return used


@pytest.mark.parametrize("length", [1, 2, 5])
def test_delayed_scales_follow_the_history(length: int) -> None:
    """1 until something was seen; then 448 over the largest of the last steps; what is no number changes nothing."""
    rng = random.Random(length)
    odd = [0.0, math.inf, math.nan, 1e-40, 3e38]
    steps = [
        [
            rng.choice([rng.choice(odd), *(rng.uniform(0, size) for size in (9, 9, 1e-3))])
            for _ in range(rng.randint(1, 3))
        ]
        for _ in range(200)
    ]
    delayed, found = DelayedScale(1, length, 448.0), []
    for amaxes in steps:
        seen = {float(delayed.of(torch.tensor([amax]), True)) for amax in amaxes}
        assert float(delayed.of(torch.tensor([1e9]), False)) in seen, "evaluation counts for nothing"
        assert len(seen) == 1, "a scale changed within a step"
        found += seen
        delayed.step()
    assert found == naive_delayed(steps, length, 448.0)
    assert len(set(found)) > 10


def test_evaluation_leaves_delayed_scales_alone() -> None:
    kernel = FP8LinearKernel(Recipe("delayed", power_of_two=False))
    x, weight = torch.randn(4, 8), torch.randn(8, 8, requires_grad=True)
    with torch.no_grad():
        gemm.linear(x, weight, kernel)
    assert kernel.delayed_scales[0].latest == 0
    gemm.linear(x, weight, kernel)
    assert kernel.delayed_scales[0].latest == x.abs().max()


def fp8_linears(*overrides: str) -> list[str]:
    """Names of the modules whose GEMMs are emulated."""
    from parallel import groups
    from parallel.runtime import cpu

    cpu.prepare()
    (chunk,) = build_tiny("precision=fp8_block", *overrides)
    groups.destroy()
    return [
        name for name, module in chunk.named_modules() if isinstance(getattr(module, "kernel", None), FP8LinearKernel)
    ]


MLA = {f"self_attention.linear_{name}" for name in ("q_down_proj", "q_up_proj", "kv_down_proj", "kv_up_proj", "proj")}
DENSE = {"mlp.linear_fc1", "mlp.linear_fc2"}
SHARED = {"mlp.shared_experts.linear_fc1", "mlp.shared_experts.linear_fc2"}
MOE = SHARED | {"mlp.experts.linear_fc1", "mlp.experts.linear_fc2"}


def test_exactly_the_linear_layers_of_transformer_layers_are_in_fp8() -> None:
    """And, as upstream, the projection of multi-token prediction; no embedding, head, router or norm."""
    (names,) = run_distributed(fp8_linears, 1, "model.num_dense_layers=1")
    layers = {"decoder.layers.0.": MLA | DENSE, "decoder.layers.1.": MLA | MOE}
    prediction = {name for name in names if name.startswith("mtp.")}
    assert {name for name in names if name not in prediction} == {p + n for p, ns in layers.items() for n in ns}
    assert {name.partition("layers.0.")[2].partition("layer.")[2] or name for name in prediction} == MLA | MOE | {
        "mtp.layers.0.eh_proj"
    }


def test_first_and_last_layers_stay_in_bf16() -> None:
    """By their number in the whole model; experts one by one and attention with a bias are emulated as well."""
    (names,) = run_distributed(
        fp8_linears, 1, "model.num_layers=5", "precision.first_last_layers_bf16=true", "model.mtp_num_layers=0",
        "precision.num_layers_at_start_in_bf16=2", "precision.num_layers_at_end_in_bf16=1",
        "backend.grouped_gemm=false", "model.attention=gqa", "model.qkv_bias=true",
    )  # fmt: skip
    assert {name.split(".")[2] for name in names} == {"2", "3"}
    assert "decoder.layers.2.self_attention.linear_qkv" in names
    assert "decoder.layers.3.mlp.experts.local_experts.15.linear_fc2" in names
