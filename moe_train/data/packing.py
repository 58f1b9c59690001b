"""Documents of a micro-batch as packed sequences: attention stays within each, and no [s, s] mask is made."""

from __future__ import annotations

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

Batch = dict[str, Tensor]

CU_SEQLENS, MAX_SEQLEN = "cu_seqlens", "max_seqlen"
"""Names in a packed batch: where documents begin, and the end of the last one, int32 [documents + 1]; length of the
longest one, a scalar that stays on the CPU."""


def pack(batch: Batch) -> Batch:
    """A batch of [b, s] tensors as one row [1, b * s], with the boundaries of its documents.

    A document begins where `position_ids` is 0, which each row does.
    """
    begins = (batch["position_ids"].flatten() == 0).nonzero().squeeze(1)
    boundaries = torch.cat([begins, begins.new_tensor([batch["position_ids"].numel()])])
    packed = {name: value.reshape(1, -1) for name, value in batch.items()}
    return {**packed, CU_SEQLENS: boundaries.to(torch.int32), MAX_SEQLEN: boundaries.diff().max()}


def packed_seq_params(batch: Batch) -> PackedSeqParams | None:
    """What Megatron-Core needs to keep the documents of a packed batch apart; None for a batch that is not packed."""
    if CU_SEQLENS not in batch:
        return None
    boundaries, longest = batch[CU_SEQLENS], int(batch[MAX_SEQLEN])
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=boundaries, cu_seqlens_kv=boundaries, max_seqlen_q=longest, max_seqlen_kv=longest
    )
