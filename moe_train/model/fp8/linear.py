"""fprop, dgrad and wgrad of a linear layer in FP8, emulated on the CPU.

Each operand is quantised to FP8 along the reduction dimension of its GEMM, always from the high-precision tensor. GEMMs
accumulate in fp32. If all scales are powers of two, dequantised values are exact in bf16, and the faster bf16 GEMM
computes the same sums.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from moe_train.model.fp8 import quantisation
from moe_train.model.fp8.delayed_scaling import DelayedScale
from moe_train.model.kernels import gemm
from moe_train.model.kernels.gemm import Counts
from parallel.fp8_recipes import RECIPES, FP8Recipe


@dataclass(frozen=True)
class Recipe:
    """How linear layers use FP8.

    Args:
        scaling: block, tensor, delayed or mxfp8.
        hybrid: E5M2 for gradients instead of E4M3.
        power_of_two: cut the scales of block and tensor to powers of two.
        history: steps in the amax history of delayed scaling.
        dispatch: also dispatch tokens in FP8 (dispatch.py).
    """

    scaling: str
    hybrid: bool = False
    power_of_two: bool = True
    history: int = 1024
    dispatch: bool = False

    @property
    def exact_in_bf16(self) -> bool:
        """Whether rounded values are a bf16 number each."""
        return self.row.e8m0_scales or (self.power_of_two and not self.row.delayed)

    @property
    def row(self) -> FP8Recipe:
        """What is known of the recipe."""
        return RECIPES[self.scaling]


class Operand:
    """One of the three tensors of a linear layer: its input, its weight or the gradient of its output."""

    def __init__(self, recipe: Recipe, count: int, *, is_weight: bool = False, is_gradient: bool = False) -> None:
        self.recipe, self.is_weight = recipe, is_weight
        self.format = quantisation.E5M2 if is_gradient and recipe.hybrid else quantisation.E4M3
        largest = quantisation.LARGEST[self.format]
        self.delayed = DelayedScale(count, recipe.history, largest) if recipe.row.delayed else None

    def scale(self, x: Tensor, counts: Counts, training: bool) -> Tensor | None:
        """One scale for each tensor, for both directions of `x`: [experts] for rows in groups of `counts` or for the
        weights of experts, else [1]. None where tiles have scales of their own.

        Args:
            training: whether delayed scaling remembers this tensor (not while evaluating).
        """
        if self.recipe.row.scaled_blocks:
            return None
        parts = [x] if counts is None else x.unbind() if self.is_weight else x.split(list(counts))
        zero = x.new_zeros((), dtype=torch.float32)
        amax = torch.stack([part.abs().amax().float() if part.numel() else zero for part in parts])
        if self.delayed is not None:
            return self.delayed.of(amax, training)
        return quantisation.scale_of(amax, quantisation.LARGEST[self.format], torch.float32, self.recipe.power_of_two)

    def rounded(self, x: Tensor, along: int, scale: Tensor | None, counts: Counts) -> Tensor:
        """`x` quantised to FP8 and back, for a GEMM with the reduction dimension `along` (-1 columns, -2 rows).

        Sums over rows never leave a group of `counts` rows, nor do their tiles.
        """
        dtype = x.dtype if self.recipe.exact_in_bf16 else torch.float32
        if scale is not None:
            return self._with_scale(x, scale, counts).to(dtype)
        if counts is not None and along == -2 and not self.is_weight:
            return torch.cat([self._in_tiles(part, along, dtype) for part in x.split(list(counts))])
        return self._in_tiles(x, along, dtype)

    def _with_scale(self, x: Tensor, scale: Tensor, counts: Counts) -> Tensor:
        if counts is not None and not self.is_weight:
            scale = scale.repeat_interleave(torch.tensor(counts, device=x.device))
        scale = scale.view(-1, *[1] * (x.dim() - 1))
        return quantisation.round_values(x.float() * scale, self.format).mul_(1.0 / scale)

    def _in_tiles(self, x: Tensor, along: int, dtype: torch.dtype) -> Tensor:
        mx, length = self.recipe.row.e8m0_scales, self.recipe.row.tile
        assert length is not None, "recipes with one scale a tensor do not come here"
        tile = (length, length) if self.is_weight and not mx else (1, length) if along == -1 else (length, 1)
        power_of_two = self.recipe.power_of_two
        return quantisation.rounded(x, tile, dtype, dtype=self.format, power_of_two=power_of_two, mx=mx)


class FP8LinearKernel(gemm.LinearKernel):
    """Emulated GEMMs of one linear layer, or of one linear layer of `count` local experts."""

    def __init__(self, recipe: Recipe, count: int = 1) -> None:
        self.recipe = recipe
        self.input, self.weight = Operand(recipe, count), Operand(recipe, count, is_weight=True)
        self.gradient = Operand(recipe, count, is_gradient=True)

    @property
    def delayed_scales(self) -> list[DelayedScale]:
        """Those of input, weight and gradient where scaling is delayed, else none."""
        operands = (self.input, self.weight, self.gradient)
        return [operand.delayed for operand in operands if operand.delayed is not None]

    def fprop(self, x: Tensor, weight: Tensor, counts: Counts, training: bool) -> Tensor:
        rounded = self.input.rounded(x, -1, self.input.scale(x, counts, training), counts)
        weights = self.weight.rounded(weight, -1, self.weight.scale(weight, counts, training), counts)
        return gemm.matmul(rounded, weights.mT, counts).to(x.dtype)

    def backward(self, grad: Tensor, x: Tensor, weight: Tensor, counts: Counts) -> tuple[Tensor, Tensor]:
        """dgrad and wgrad. x and the weight are quantised again, so that only their 16-bit tensors are saved."""
        scale = self.gradient.scale(grad, counts, training=True)
        by_columns = self.gradient.rounded(grad, -1, scale, counts)
        # A scale for the whole tensor gives the same values along either dimension.
        by_rows = by_columns if scale is not None else self.gradient.rounded(grad, -2, None, counts)
        return self._dgrad(by_columns, weight, counts).to(grad.dtype), self._wgrad(by_rows, x, counts)

    def dgrad(self, grad: Tensor, weight: Tensor, counts: Counts) -> Tensor:
        scale = self.gradient.scale(grad, counts, training=True)
        return self._dgrad(self.gradient.rounded(grad, -1, scale, counts), weight, counts).to(grad.dtype)

    def wgrad(self, grad: Tensor, x: Tensor, counts: Counts) -> Tensor:
        scale = self.gradient.scale(grad, counts, training=True)
        return self._wgrad(self.gradient.rounded(grad, -2, scale, counts), x, counts)

    def _dgrad(self, rounded: Tensor, weight: Tensor, counts: Counts) -> Tensor:
        weights = self.weight.rounded(weight, -2, self.weight.scale(weight, counts, training=False), counts)
        return gemm.matmul(rounded, weights, counts)

    def _wgrad(self, rounded: Tensor, x: Tensor, counts: Counts) -> Tensor:
        inputs = self.input.rounded(x, -2, self.input.scale(x, counts, training=False), counts)
        return gemm.matmul_tn(rounded, inputs, counts).to(x.dtype)


def recipe_of(module: Any) -> Recipe | None:
    """What a linear layer emulates; None for one in high precision and for other modules."""
    kernel = getattr(module, "kernel", None)
    return kernel.recipe if isinstance(kernel, FP8LinearKernel) else None


def in_fp8(linear: type, recipe: Recipe | None) -> type:
    """`linear`, a class of layers with `kernel`, with those of each layer emulated; `linear` itself without a recipe.

    One class for each recipe, which Megatron-Core's specs can name.
    """
    return linear if recipe is None else _emulating(linear, recipe)


def with_linears(module: type, attribute: str, recipe: Recipe | None) -> type:
    """`module`, which makes linear layers of the class `module.attribute` itself, with those of `in_fp8`."""
    return module if recipe is None else _making(module, attribute, recipe)


@cache
def _emulating(linear: type, recipe: Recipe) -> type:
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        linear.__init__(self, *args, **kwargs)  # type: ignore[misc]
        self.kernel = FP8LinearKernel(recipe, len(self.weight) if self.weight.dim() == 3 else 1)

    return type(f"Fp8{linear.__name__}", (linear,), {"__init__": init, "__doc__": f"{linear.__name__} in FP8."})


@cache
def _making(module: type, attribute: str, recipe: Recipe) -> type:
    linears = {attribute: in_fp8(getattr(module, attribute), recipe)}
    return type(f"Fp8{module.__name__}", (module,), {**linears, "__doc__": f"{module.__name__} in FP8."})
