"""How the sequence of a batch is divided over context-parallel ranks."""

from __future__ import annotations

import torch
from torch import Tensor


def on_this_rank(batch: dict[str, Tensor], rank: int, cp: int) -> dict[str, Tensor]:
    """The part of `batch` that context-parallel rank `rank` of `cp` holds: slices `rank` and 2cp-1-rank of 2cp.

    This zig-zag gives each rank the same causal work. Dimension 1 is the sequence. It is that of
    `megatron.core.utils.get_batch_on_this_cp_rank`, whose arguments differ between the supported versions.
    """
    if cp == 1:
        return batch
    parts: dict[str, Tensor] = {}
    for name, value in batch.items():
        slices = value.chunk(2 * cp, dim=1)
        parts[name] = torch.cat([slices[rank], slices[2 * cp - 1 - rank]], dim=1)
    return parts
