"""Runs Megatron-Core's dynamic engine on the CPU: its own classes, and kernels of flash-attn written in PyTorch."""

from __future__ import annotations

import functools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.inference.contexts import dynamic_context
from megatron.core.inference.engines import dynamic_engine
from megatron.core.transformer import attention
from torch import Tensor, nn

from moe_train.ranks import RankContext


def as_te(ranks: RankContext) -> RankContext:
    """The same ranks, as if Transformer Engine had built the model."""
    return RankContext(replace(ranks.resolved, backend="te"), ranks.rank, ranks.device)


def install(patch: pytest.MonkeyPatch) -> None:
    """Until `patch` is undone."""
    patch.setattr(torch.cuda, "current_device", lambda: "cpu")
    patch.setattr(torch.cuda, "current_stream", lambda *_: SimpleNamespace(synchronize=lambda: None))
    patch.setattr(torch.cuda, "Event", _Event)
    for name in ("empty", "empty_like", "zeros", "zeros_like", "full", "tensor", "arange", "ones"):
        patch.setattr(torch, name, _pageable(getattr(torch, name)))
    for name in ("range_push", "range_pop", "nvtx_range_push", "nvtx_range_pop"):
        patch.setattr(dynamic_engine, name, lambda *_, **__: None, raising=False)
    for name in ("range_push", "range_pop"):
        patch.setattr(torch.cuda.nvtx, name, lambda *_: None)
    patch.setattr(dynamic_context, "triton_append_key_value_cache", None)
    patch.setattr(attention, "HAVE_FA3", True)
    patch.setattr(attention, "rearrange", lambda tensor, _: tensor.flatten(2))  # of einops: s b h d -> s b (h d)
    patch.setattr(attention.Attention, "flash_decode_and_prefill", _paged_attention)


class _Event:
    """In place of an event of CUDA."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record(self, *_: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def wait(self, *_: Any) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, _: Any) -> float:
        return 1.0


def _pageable(function: Any) -> Any:
    """Without `pin_memory`, which needs a GPU."""

    @functools.wraps(function)
    def changed(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("pin_memory", None)
        return function(*args, **kwargs)

    return changed


def _paged_attention(
    self: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seqlens_k: Tensor,
    block_table: Tensor,
    is_decode_only: bool,
    *_: Any,
    **__: Any,
) -> Tensor:
    """What flash-attn computes: causal attention of the last queries of each sequence to its blocks."""
    assert k.size(1) % 256 == 0  # as flash-attn 2 wants it
    rows = q[:, 0] if not is_decode_only else q.reshape(-1, *q.shape[-2:])
    output = torch.zeros_like(rows)
    for index, length in enumerate(seqlens_k.tolist()):
        begin = int(cu_seqlens_q[index]) if not is_decode_only else index
        end = int(cu_seqlens_q[index + 1]) if not is_decode_only else index + 1
        if end == begin or length == 0:
            continue
        blocks = block_table[index][: -(-length // k.size(1))].long()
        keys, values = (cache[blocks].flatten(0, 1)[:length] for cache in (k, v))
        groups = rows.size(1) // keys.size(1)
        keys, values = (tensor.repeat_interleave(groups, dim=1) for tensor in (keys, values))
        scores = torch.einsum("qhd,khd->hqk", rows[begin:end], keys) * rows.size(-1) ** -0.5
        positions = torch.arange(length)
        future = positions > torch.arange(length - (end - begin), length).unsqueeze(1)
        weights = scores.masked_fill(future, -torch.inf).softmax(dim=-1)
        output[begin:end] = torch.einsum("hqk,khd->qhd", weights, values)
    return output.unsqueeze(1) if not is_decode_only else output.reshape(q.shape)
