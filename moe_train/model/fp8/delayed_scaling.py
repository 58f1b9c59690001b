"""Delayed scaling: FP8 scales from the largest values of earlier steps, the same on all ranks that share a tensor.

The rule is Transformer Engine's (common/recipe/delayed_scaling.cu), with its default of the largest in the history.
Two things differ, so that neither accumulation, pipelines, recomputation nor the layout of ranks change a result:

- Scales change once a step, from the largest value in any of its micro-batches; upstream's change with each of them.
- An expert has statistics of its own, reduced over the ranks that hold it; upstream reduces by place over all
  tensor-, context- and data-parallel ranks, so that experts at the same place of different ranks share one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as ps
from torch import Tensor, nn


class DelayedScale:
    """Scales of `count` tensors: 1 until something was seen, then `largest` over the largest of the last steps.

    Args:
        count: tensors, 1 or the experts of a rank.
        length: steps that are looked back on.
        largest: largest number of the FP8 format.
    """

    def __init__(self, count: int, length: int, largest: float) -> None:
        self.largest = largest
        self.history = torch.zeros(length, count)  # newest first
        self.scale = torch.ones(count)
        self.latest = torch.zeros(count)  # of this step, so far

    def of(self, amax: Tensor, training: bool) -> Tensor:
        """The scales [count] for tensors whose largest values are `amax` [count]; those count from the next step on.

        Args:
            training: whether they count at all (not while evaluating). Seeing a tensor twice changes nothing.
        """
        if training:
            torch.fmax(self.latest, amax, out=self.latest)  # ignores NaN, as upstream does
        return self.scale

    def step(self) -> None:
        """End a step. A tensor that was all zeros leaves its history alone, and an infinity in it leaves the scale."""
        moved = torch.cat([self.latest[None], self.history[:-1]])
        self.history = torch.where(self.latest > 0, moved, self.history)
        most = self.history.amax(dim=0)
        new = torch.div(torch.tensor(self.largest), most).clamp(max=torch.finfo(torch.float32).max)
        self.scale = torch.where((most > 0) & torch.isfinite(most), new, self.scale)
        self.latest = torch.zeros_like(self.latest)


def scales_of(module: nn.Module) -> list[DelayedScale]:
    """Those of a linear layer's input, weight and gradient; nothing where scaling is not delayed."""
    return list(getattr(getattr(module, "kernel", None), "delayed_scales", ()))


def layers_of(chunks: list[Any]) -> Iterator[tuple[nn.Module, list[DelayedScale]]]:
    """Every linear layer of this rank with delayed scaling, in the same order on all ranks of a pipeline stage."""
    for chunk in chunks:
        for module in chunk.modules():
            if scales := scales_of(module):
                yield module, scales


def update(chunks: list[Any]) -> None:
    """End a step for all layers of this rank, with statistics over all ranks. Every rank calls it."""
    by_kind: dict[bool, list[DelayedScale]] = {False: [], True: []}
    for module, scales in layers_of(chunks):
        by_kind[bool(getattr(module, "is_expert", False))] += scales
    for is_expert, scales in by_kind.items():
        if not scales:
            continue
        latest = torch.cat([scale.latest for scale in scales])
        for group in _groups(is_expert):
            if group.size() > 1:
                dist.all_reduce(latest, dist.ReduceOp.MAX, group=group)
        for scale, part in zip(scales, latest.split([len(scale.latest) for scale in scales]), strict=True):
            scale.latest = part
            scale.step()


def discard(chunks: list[Any]) -> None:
    """End a step that is not to count."""
    for _, scales in layers_of(chunks):
        for scale in scales:
            scale.latest = torch.zeros_like(scale.latest)


def _groups(is_expert: bool) -> list[Any]:
    """Ranks that hold parts or copies of the same tensors."""
    if is_expert:
        return [ps.get_expert_tensor_parallel_group(), ps.get_expert_data_parallel_group()]
    return [ps.get_amax_reduction_group(with_context_parallel=True)]


def packed(scales: list[DelayedScale], index: int) -> Tensor:
    """What a checkpoint keeps of tensor `index`: [scales, 1 + length], the scale and then the history."""
    return torch.stack([torch.cat([s.scale[index : index + 1], s.history[:, index]]) for s in scales])


def unpack(scales: list[DelayedScale], index: int, values: Tensor) -> None:
    """Put `packed` values back."""
    for scale, value in zip(scales, values, strict=True):
        scale.scale[index], scale.history[:, index] = value[0], value[1:]
