"""Loss of a model on several sources of text, in any layout of ranks."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron.core import parallel_state as ps
from torch import nn

from moe_train.data.iterator import BatchIterator
from moe_train.data.scoring import Mixture
from moe_train.loop import forward
from moe_train.objectives import base
from moe_train.objectives.by_source import BySource
from moe_train.ranks import RankContext
from moe_train.schedules import BatchSchedule

_MICRO_BATCHES = 64
"""Of one data-parallel rank between two flushes of the pipeline, about."""


@dataclass(frozen=True)
class TokenLoss:
    """Sum of -log p over the scored tokens of a source, nats, and their number."""

    total: float
    tokens: int

    @property
    def mean(self) -> float | None:
        """Nats per token; None where no token is scored."""
        return self.total / self.tokens if self.tokens else None

    @property
    def perplexity(self) -> float | None:
        """exp of the mean; infinite where that is too large a number."""
        mean = self.mean
        if mean is None or math.isnan(mean):
            return mean
        return math.exp(mean) if mean < math.log(sys.float_info.max) else math.inf

    def bits_per_byte(self, num_bytes: int) -> float | None:
        """Of text of `num_bytes`; None where that is nothing."""
        return self.total / math.log(2) / num_bytes if num_bytes else None

    def __add__(self, other: TokenLoss) -> TokenLoss:
        return TokenLoss(self.total + other.total, self.tokens + other.tokens)


def score(
    ranks: RankContext, chunks: Sequence[nn.Module], parts: Sequence[Any], sources: int,
    beat: Callable[[], None] | None = None,
) -> list[TokenLoss]:  # fmt: skip
    """The loss of each source. Every rank calls it, and gets the same.

    Args:
        chunks: this rank's part of the model, with or without DDP around it.
        parts: datasets, as `Mixture` takes them.
        sources: number of sources in all of them.
        beat: called at each forward pass.
    """
    plan = PassPlan.of(ranks, sum(map(len, parts)))
    samples = BatchIterator(
        Mixture(parts, plan.batches * plan.batch_size),
        dp_rank=ps.get_data_parallel_rank(),
        dp_size=ranks.layout.dp,
        micro_batch_size=ranks.cfg.batch.micro_batch_size,
        schedule=BatchSchedule.constant(plan.batch_size),
        device=ranks.device,
        packed=ranks.cfg.data.reset_at_eod,
    )
    objective = BySource(base.create(ranks.cfg), sources)
    iterators = samples.for_chunks(ranks.layout.vpp)
    reduced = forward.evaluate(ranks, chunks, objective, iterators, plan.batches, plan.batch_size, beat)
    found = reduced.metrics
    return [TokenLoss(found[f"loss_{number}"], round(found[f"tokens_{number}"])) for number in range(sources)]


@dataclass(frozen=True)
class PassPlan:
    """Global batches that hold all samples, with few samples of nothing.

    Args:
        forward_passes: of one rank, over all its chunks.
    """

    batches: int
    batch_size: int
    forward_passes: int

    @classmethod
    def of(cls, ranks: RankContext, samples: int) -> PassPlan:
        """A batch is whole micro-batches on each data-parallel rank, and with an interleaved pipeline on each stage."""
        layout, each = ranks.layout, ranks.resolved.data_ranks_batch
        multiple = layout.pp if layout.vpp > 1 else 1
        units = math.ceil(samples / (each * multiple))
        batches = math.ceil(units * multiple / _MICRO_BATCHES)
        micro_batches = math.ceil(units / batches) * multiple
        return cls(batches, micro_batches * each, batches * micro_batches * layout.vpp)
