"""RMSNorm for the `local` backend: upstream's transformer/torch_norm.py refuses sequence parallelism."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension: `[..., hidden_size]` in and out, statistics in fp32."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        # Megatron-Core then sums this gradient over the tensor-parallel ranks, each of which saw other tokens.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and x.dtype is torch.float32:
            normalised: Tensor = NormOnCPU.apply(x, self.weight, self.eps)
            return normalised
        # Torch makes the norm of several operations that read x. Through a view their gradients are added up before
        # that of the residual is, which recomputation does too: so it changes no bit.
        x = x.view_as(x)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class NormOnCPU(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in fp32. It keeps x and one number a row; torch's,
    composed of six operations on a CPU, also keeps the normalised x and takes 1.5 times as long."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """[..., h] and [h] -> [..., h]."""
        rows = x.reshape(-1, x.size(-1))
        inverse_root = torch.linalg.vecdot(rows, rows).div_(rows.size(1)).add_(eps).rsqrt_().unsqueeze(1)
        ctx.save_for_backward(x, weight, inverse_root)
        return (rows * inverse_root).mul_(weight).view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse_root = ctx.saved_tensors
        normalised = x.reshape(-1, x.size(-1)) * inverse_root
        grad_rows = grad.reshape(normalised.shape)
        aligned = grad_rows * normalised
        grad_weight = aligned.sum(0)
        # d(x / root)/dx removes from the gradient its part along x.
        along_x = torch.mv(aligned, weight).div_(-x.size(-1)).unsqueeze(1)
        grad_x = (grad_rows * weight).addcmul_(normalised, along_x).mul_(inverse_root)
        return grad_x.view(x.shape), grad_weight, None


class ApexRMSNorm:
    """NVIDIA apex's fused RMSNorm (`backend.apex=true`); Megatron-Core's own wrapper of apex knows only LayerNorm."""

    def __new__(cls, config: Any, hidden_size: int, eps: float = 1e-6, **_: Any) -> Any:
        from apex.normalization import FusedRMSNorm

        norm: Any = FusedRMSNorm(hidden_size, eps=eps).to(torch.cuda.current_device(), config.params_dtype)
        norm.weight.sequence_parallel = config.sequence_parallel
        return norm


class AllHeadsRMSNorm(nn.Module):
    """Norm of queries or keys over all heads together (OLMoE), which several tensor-parallel ranks may share.

    The weight is kept whole on every rank. Each rank uses its own heads' part, so summing the gradient over the
    ranks, as Megatron-Core does with every query and key norm, gives the whole gradient.
    """

    def __init__(self, config: Any, heads: int, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.eps, self.heads, self.head_dim = eps, heads, hidden_size
        self.weight = nn.Parameter(
            torch.ones(heads * hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )

    def forward(self, x: Tensor) -> Tensor:
        """`[s, b, local heads, head_dim]` in and out."""
        local = x.size(-2) * self.head_dim
        squares = x.float().square().sum(dim=(-2, -1), keepdim=True)
        start = 0
        if local != self.heads * self.head_dim:
            squares = all_reduce(squares, group=parallel_state.get_tensor_model_parallel_group())
            start = parallel_state.get_tensor_model_parallel_rank() * local
        scale = torch.rsqrt(squares / (self.heads * self.head_dim) + self.eps)
        weight = self.weight[start : start + local].view(x.size(-2), self.head_dim)
        return (x.float() * scale).to(x.dtype) * weight


class QueryAllHeadsRMSNorm(AllHeadsRMSNorm):
    """`AllHeadsRMSNorm` of the queries."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__(config, config.num_attention_heads, hidden_size, eps)


class KeyAllHeadsRMSNorm(AllHeadsRMSNorm):
    """`AllHeadsRMSNorm` of the keys."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__(config, config.num_query_groups, hidden_size, eps)
