"""Forward and backward passes of a global batch, and the mean loss over all ranks. They need no optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as ps
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from moe_train.ranks import RankContext
from parallel import sequence

Batch = dict[str, Tensor]


def micro_batches_of(ranks: RankContext, samples: int) -> int:
    """Forward passes of one data-parallel rank over a global batch of `samples`."""
    return samples // (ranks.cfg.batch.micro_batch_size * ranks.layout.dp)


@torch.no_grad()
def mean_loss(
    ranks: RankContext, chunks: Sequence[nn.Module], batches: Sequence[Iterator[Batch]], count: int, samples: int,
    beat: Callable[[], None] | None = None,
) -> float | None:  # fmt: skip
    """Mean loss over `count` global batches of `samples`, nats a token; None where no token counts.

    Every rank calls it.

    Args:
        chunks: this rank's part of the model, with or without DDP around it.
        batches: an iterator over micro-batches for each chunk.
        beat: called at each forward pass.
    """
    for chunk in chunks:
        chunk.eval()
    losses: list[Tensor] = []
    for _ in range(count):
        losses += forward_backward(ranks, chunks, batches, samples, forward_only=True, beat=beat)
    for chunk in chunks:
        chunk.train()
    return mean(losses, ranks.device)[0]


def forward_backward(
    ranks: RankContext, chunks: Sequence[nn.Module], batches: Sequence[Iterator[Batch]], samples: int, *,
    forward_only: bool, beat: Callable[[], None] | None = None,
) -> list[Tensor]:  # fmt: skip
    """[loss sum, tokens] of each micro-batch, on the last pipeline stage; empty elsewhere."""
    outputs = get_forward_backward_func()(
        forward_step_func=partial(_forward_step, beat),
        data_iterator=list(batches) if len(batches) > 1 else batches[0],
        model=list(chunks),
        num_microbatches=micro_batches_of(ranks, samples),
        seq_length=ranks.cfg.train.seq_length,
        micro_batch_size=ranks.cfg.batch.micro_batch_size,
        forward_only=forward_only,
    )
    return [output["loss"] for output in outputs]


def _forward_step(beat: Callable[[], None] | None, batches: Iterator[Batch], chunk: Any) -> tuple[Tensor, Any]:
    if beat is not None:
        beat()
    batch = sequence.on_this_rank(next(batches), ps.get_context_parallel_rank(), ps.get_context_parallel_world_size())
    losses = chunk(
        batch["tokens"],
        batch["position_ids"],
        batch.get("attention_mask"),
        labels=batch["labels"],
        # Upstream counts tokens with it for multi-token prediction, and would cast fp32 to the training precision first
        # (`Float16Module`): bf16 cannot count beyond 256, and fp16 ends at 65,504.
        loss_mask=batch["loss_mask"].double(),
    )
    return losses, partial(_loss, batch["loss_mask"])


def _loss(mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum over the tokens of a micro-batch, [b, s] each; Megatron-Core divides by the tokens of the global batch."""
    total = (losses.float() * mask).sum()
    tokens = mask.sum(dtype=torch.float64).to(torch.int)
    # Copies, because the schedule scales the returned loss in place. fp32 would not count beyond 2^24 tokens.
    return total, tokens, {"loss": torch.stack([total.detach().double(), tokens.double()])}


def mean(losses: list[Tensor], device: torch.device, doubt: bool = False) -> tuple[float | None, bool]:
    """Mean over all tokens of all ranks, None where none counts, and whether any rank has a doubt. Only tensor rank 0
    of the last stage adds its losses: others hold copies."""
    total = torch.zeros(3, dtype=torch.float64, device=device)
    if losses and ps.get_tensor_model_parallel_rank() == 0:
        total[:2] += torch.stack(losses).sum(dim=0)
    total[2] = float(doubt)
    dist.all_reduce(total)
    loss, tokens, doubts = total.tolist()
    return loss / tokens if tokens else None, doubts > 0
