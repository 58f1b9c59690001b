"""The reduction of losses and metrics over micro-batches and ranks, as an objective declares them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import inf

import torch
import torch.distributed as dist
from megatron.core import parallel_state as ps
from torch import Tensor

from moe_train.objectives.base import Loss, Objective
from moe_train.telemetry.registry import Reduction

_PARTS = {Reduction.SUM: 1, Reduction.MEAN: 2, Reduction.MAX: 1}
"""Scalars of a metric in one micro-batch."""


@dataclass(frozen=True)
class Partial:
    """What a micro-batch contributes, fp64."""

    sums: Tensor
    """Loss, denominator, then each sum, and each mean with its denominator, in the order of their declaration."""
    maxima: Tensor


@dataclass(frozen=True)
class Reduced:
    """Values of a global batch, the same on every rank."""

    loss: float | None
    """Mean; None where the denominator is zero."""
    metrics: dict[str, float]
    """Without means whose denominator is zero, and maxima of nothing."""
    anomaly: bool
    """Whether any rank has found an anomaly in the step."""


def partial_of(objective: Objective, loss: Loss) -> Partial:
    """The contribution of one micro-batch. It is a copy: the pipeline schedule scales the loss in place.

    Raises:
        ValueError: the metrics are not those that the objective declares.
    """
    if loss.metrics.keys() != objective.reductions.keys():
        name = type(objective).__name__
        raise ValueError(f"{name} declares metrics {sorted(objective.reductions)}, and returned {sorted(loss.metrics)}")
    # fp32 would not count beyond 2^24 tokens.
    sums = [loss.total.detach().double(), loss.denominator.double()]
    maxima = [sums[0].new_empty(0)]
    for name, reduction in objective.reductions.items():
        value = loss.metrics[name]
        parts = value if isinstance(value, tuple) else (value,)
        if len(parts) != _PARTS[reduction]:
            raise ValueError(f"{type(objective).__name__}: metric {name} is declared as {reduction.value}")
        scalars = [part.detach().double() for part in parts]
        if reduction is Reduction.MAX:
            maxima.append(scalars[0].reshape(1))
        else:
            sums += scalars
    return Partial(torch.stack(sums), torch.cat(maxima))


def reduce(objective: Objective, partials: list[Partial], device: torch.device, anomaly: bool = False) -> Reduced:
    """Values over all micro-batches of all ranks. Every rank calls it: one all-reduce, and one more for maxima.

    Args:
        partials: of this rank; nothing before the last pipeline stage.
        anomaly: whether this rank has found one in the step.
    """
    kinds = list(objective.reductions.values())
    count = 2 + kinds.count(Reduction.SUM) + 2 * kinds.count(Reduction.MEAN)
    sums = torch.zeros(count + 1, dtype=torch.float64, device=device)
    maxima = torch.full((kinds.count(Reduction.MAX),), -inf, dtype=torch.float64, device=device)
    # Only tensor rank 0 of the last stage adds its losses: others hold copies.
    if partials and ps.get_tensor_model_parallel_rank() == 0:
        sums[:count] += torch.stack([partial.sums for partial in partials]).sum(dim=0)
        maxima = torch.stack([partial.maxima for partial in partials]).amax(dim=0)
    sums[count] = float(anomaly)
    dist.all_reduce(sums)
    if len(maxima):
        dist.all_reduce(maxima, op=dist.ReduceOp.MAX)
    loss, denominator, *rest, anomalies = sums.tolist()
    metrics = _metrics(objective, iter(rest), iter(maxima.tolist()))
    return Reduced(loss / denominator if denominator else None, metrics, anomalies > 0)


def _metrics(objective: Objective, sums: Iterator[float], maxima: Iterator[float]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for name, reduction in objective.reductions.items():
        if reduction is Reduction.MAX:
            largest = next(maxima)
            if largest != -inf:
                metrics[name] = largest
            continue
        total = next(sums)
        if reduction is Reduction.SUM:
            metrics[name] = total
        elif denominator := next(sums):
            metrics[name] = total / denominator
    return metrics
