"""AdamW whose two moments are stored in bf16, for the `local` backend. All arithmetic is in fp32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

_CHUNK = 1 << 18  # elements whose moments exist in fp32 at a time: 2 MiB, so that they stay in the cache


class AdamWithBf16Moments(torch.optim.AdamW):
    """torch's fused AdamW over fp32 parameters, with `exp_avg` and `exp_avg_sq` in bf16 between the steps.

    Args:
        groups: parameter groups of a `torch.optim.AdamW`, with all of its options. They are kept, not copied.
        seed: of stochastic rounding; None rounds to the nearest. bf16 has 8 bits of precision, so to the nearest a
            moment no longer changes once a step would change it by less than 1 part in 512: with beta2=0.999 the second
            moment does as soon as squared gradients are below three times their mean.
    """

    def __init__(self, groups: list[dict[str, Any]], seed: int | None = None) -> None:
        super().__init__([torch.empty(0)])
        self.param_groups = groups  # not above: shards of the distributed optimizer are views, which torch refuses
        self._seed = seed
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(parameter, dtype=torch.bfloat16),
                    "exp_avg_sq": torch.zeros_like(parameter, dtype=torch.bfloat16),
                }

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # Megatron-Core passes no closure
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        flat = (parameter, grad, state["exp_avg"], state["exp_avg_sq"])
        for weight, slope, *moments in zip(*(t.view(-1).split(_CHUNK) for t in flat), strict=True):
            wide = [moment.float() for moment in moments]
            adamw(
                [weight], [slope], [wide[0]], [wide[1]], [], [state["step"].clone()], fused=True, amsgrad=False,
                beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
                maximize=False,
            )  # fmt: skip
            for number, (moment, exact) in enumerate(zip(moments, wide, strict=True)):
                if self._seed is not None:
                    round_stochastically(exact, self._seed, 2 * int(state["step"]) + number)
                moment.copy_(exact)
        state["step"] += 1


def round_stochastically(values: Tensor, seed: int, draw: int) -> None:
    """Round fp32 `values` in place to a neighbour in bf16, with a probability linear in the distance to the other one.

    The noise is a hash of the value, the seed and the number of the draw. So it needs no state that a checkpoint would
    have to carry, and ranks that hold copies of a weight, in any layout, round them alike.
    """
    bits = values.view(torch.int32)
    # The key and the values go through the mixer "lowbias32" (https://nullprogram.com/blog/2018/07/31/).
    key = _mixed(torch.tensor([(seed * 0x9E3779B1 + draw) % 2**32 - 2**31]).to(torch.int32))
    noise = _mixed(bits ^ key).bitwise_and_(0xFFFF)
    rounded = noise.add_(bits).bitwise_and_(-0x10000).view(torch.float32)
    torch.where(values.isfinite(), rounded, values, out=values)


def _mixed(x: Tensor) -> Tensor:
    """A hash of each int32, in which every bit of the input changes half of the bits."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - 2**32), (16, 1)):
        x = x ^ ((x >> shift) & (2 ** (32 - shift) - 1))  # a shift that brings in zeros
        x.mul_(factor)
    return x
