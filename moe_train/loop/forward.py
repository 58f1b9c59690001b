"""Forward and backward passes of a global batch with an objective. They need no optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state as ps
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from moe_train.objectives.base import Batch, Objective
from moe_train.objectives.reduction import Partial, Reduced, partial_of, reduce
from moe_train.ranks import RankContext
from parallel import sequence


@torch.no_grad()
def evaluate(
    ranks: RankContext, chunks: Sequence[nn.Module], objective: Objective, batches: Sequence[Iterator[Batch]],
    count: int, samples: int, beat: Callable[[], None] | None = None,
) -> Reduced:  # fmt: skip
    """Loss and metrics over `count` global batches of `samples`. Every rank calls it.

    Args:
        chunks: this rank's part of the model, with or without DDP around it.
        batches: an iterator over micro-batches for each chunk.
        beat: called at each forward pass.
    """
    for chunk in chunks:
        chunk.eval()
    partials: list[Partial] = []
    for _ in range(count):
        partials += forward_backward(ranks, chunks, objective, batches, samples, forward_only=True, beat=beat)
    for chunk in chunks:
        chunk.train()
    return reduce(objective, partials, ranks.device)


def forward_backward(
    ranks: RankContext, chunks: Sequence[nn.Module], objective: Objective, batches: Sequence[Iterator[Batch]],
    samples: int, *, forward_only: bool, beat: Callable[[], None] | None = None,
) -> list[Partial]:  # fmt: skip
    """What each micro-batch contributes to loss and metrics, on the last pipeline stage; empty elsewhere."""
    rows, length = ranks.cfg.batch.micro_batch_size, ranks.cfg.train.seq_length
    if ranks.cfg.data.reset_at_eod:  # packed in one row
        rows, length = 1, rows * length
    outputs = get_forward_backward_func()(
        forward_step_func=partial(_forward_step, objective, beat),
        data_iterator=list(batches) if len(batches) > 1 else batches[0],
        model=list(chunks),
        num_microbatches=ranks.micro_batches_of(samples),
        seq_length=length,
        micro_batch_size=rows,
        forward_only=forward_only,
    )
    return [output["partial"] for output in outputs]


def _forward_step(
    objective: Objective, beat: Callable[[], None] | None, batches: Iterator[Batch], chunk: Any
) -> tuple[Tensor, Any]:
    if beat is not None:
        beat()
    batch = sequence.on_this_rank(next(batches), ps.get_context_parallel_rank(), ps.get_context_parallel_world_size())
    return chunk(**objective.forward_inputs(batch)), partial(_loss, objective, batch)


def _loss(objective: Objective, batch: Batch, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Partial]]:
    """Of one micro-batch, [b, s / cp]; Megatron-Core divides gradients by the denominator of the global batch."""
    loss = objective.loss(batch, losses)
    return loss.total, loss.denominator, {"partial": partial_of(objective, loss)}
