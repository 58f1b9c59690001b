"""Transformer layers of the `local` backend in a forward pass with the KV cache, without gradients.

Few tokens are computed at a time, so what a step costs is largely the Python code and the number of operations around
the GEMMs. The layers of Megatron-Core do much there that only training needs. Here the parts of a layer are prepared
once and called one after the other, and MoE layers whose experts are all on this rank sort tokens in a few operations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import _yarn_get_concentration_factor_from_config
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from torch import Tensor

from moe_train.model.kernels import cpu_gemm, gemm
from moe_train.model.local.cached_attention import CacheContext, GroupedAttention, LatentAttention
from moe_train.model.local.cached_parts import PreparedLinear, PreparedNorm, through_module
from moe_train.model.local.experts import GroupedExperts
from moe_train.model.local.swiglu import SwiGLU, WeightedSwiGLU

FEW_ELEMENTS = 500_000
"""Of all experts of a layer: so few are read in less time than starting a GEMM for each chosen expert takes."""
MOST_MULTIPLICATIONS = {torch.float32: 20_000_000, torch.bfloat16: 60_000_000}
"""For all experts and tokens: computing so many takes less time than starting the GEMMs (two threads on a Zen 4)."""


class CachedLayer:
    """A `TransformerLayer` with the specs of `LocalBackend`: hidden [t / tp, h] -> the same shape.

    Args:
        number: of the layer in the cache.
        rotary: Megatron-Core's rotary embedding of the model; latent attention has its own.
    """

    def __init__(self, layer: Any, number: int, rotary: Any) -> None:
        self._norms = PreparedNorm(layer.input_layernorm), PreparedNorm(layer.pre_mlp_layernorm)
        attention, config = layer.self_attention, layer.config
        if isinstance(attention, MLASelfAttention):
            self._attention: LatentAttention | GroupedAttention = LatentAttention(attention, number)
        else:
            scale = _yarn_get_concentration_factor_from_config(config)
            self._attention = GroupedAttention(attention, number, rotary, scale)
        self._feed_forward = _feed_forward(layer.mlp)

    def __call__(self, hidden: Tensor, context: CacheContext) -> Tensor:
        before_attention, before_mlp = self._norms
        hidden = hidden + self._attention(before_attention(hidden), context)
        return hidden + self._feed_forward(before_mlp(hidden))


def _feed_forward(mlp: Any) -> Callable[[Tensor], Tensor]:
    """That of one layer: [t / tp, h] -> the same shape."""
    if not isinstance(mlp, MoELayer):
        return _dense(mlp)
    config = mlp.config
    degrees = config.expert_model_parallel_size, config.expert_tensor_parallel_size, config.tensor_model_parallel_size
    alone = all(degree == 1 for degree in degrees)
    return _Experts(mlp) if alone and isinstance(mlp.experts, GroupedExperts) else partial(through_module, mlp)


def _dense(mlp: Any) -> Callable[[Tensor], Tensor]:
    """A dense feed-forward, or shared experts."""
    return _SwiGLUFeedForward(mlp) if isinstance(mlp.activation_func, SwiGLU) else partial(through_module, mlp)


class _SwiGLUFeedForward:
    """Two linear layers and the SwiGLU between them."""

    def __init__(self, mlp: Any) -> None:
        self._fc1, self._fc2 = PreparedLinear(mlp.linear_fc1), PreparedLinear(mlp.linear_fc2)

    def __call__(self, x: Tensor) -> Tensor:
        return self._fc2(SwiGLU.compute(self._fc1(x)))


class _Experts:
    """An MoE layer whose experts are all on this rank: router, routed experts and shared experts."""

    def __init__(self, moe: Any) -> None:
        self._router, self._experts = moe.router, moe.experts
        self._routing_matrix = moe.router.routing_matrix()
        self._shared: Callable[[Tensor], Tensor] | None = None
        self._gate: Tensor | None = None
        if moe.use_shared_expert:
            shared = moe.shared_experts
            self._shared = _dense(shared)
            self._gate = shared.gate_weight.detach().t() if shared.use_shared_expert_gate else None
        fc1, fc2 = moe.experts.linear_fc1, moe.experts.linear_fc2
        self._is_plain = fc1.kernel is fc2.kernel is gemm.HIGH_PRECISION and fc1.weight.device.type == "cpu"
        self._all_fc1, self._all_fc2 = (fc.weight.detach().mT for fc in (fc1, fc2))
        """[experts, in, out]"""
        self._fc1, self._fc2 = list(self._all_fc1.unbind()), list(self._all_fc2.unbind())

    def __call__(self, x: Tensor) -> Tensor:
        weights, experts = self._router.chosen_experts(x, self._routing_matrix)
        if self._is_plain and x.size(0) == 1:
            output = self._one_token(x, weights, experts[0].tolist())
            return output if self._shared is None else output + self._shared_experts(x)
        if self._is_plain and self._computes_all(*weights.shape):
            output = self._all_experts(x, weights, experts)
            return output if self._shared is None else output + self._shared_experts(x)
        output = torch.zeros_like(x) if self._shared is None else self._shared_experts(x)
        experts, order = experts.flatten().sort()
        token = order // weights.size(1)
        counts = torch.bincount(experts, minlength=len(self._fc1)).tolist()
        rows, row_weights = x.index_select(0, token), weights.flatten().index_select(0, order)
        return output.index_add_(0, token, self._routed(rows, counts, row_weights))

    def _one_token(self, x: Tensor, weights: Tensor, experts: Sequence[int]) -> Tensor:
        """[1, h] through its experts."""
        gate_and_up = torch.cat([cpu_gemm.matmul_few_rows(x, self._fc1[expert]) for expert in experts])
        activated = WeightedSwiGLU.compute(gate_and_up, weights[0]).split(1)
        pairs = zip(experts, activated, strict=True)
        parts = [cpu_gemm.matmul_few_rows(own, self._fc2[expert]) for expert, own in pairs]
        return torch.cat(parts).sum(dim=0, keepdim=True)

    def _computes_all(self, tokens: int, topk: int) -> bool:
        """Whether all experts compute all tokens, in two operations."""
        elements = self._all_fc1.numel() + self._all_fc2.numel()
        all_are_busy = tokens * topk >= len(self._all_fc1) or elements <= FEW_ELEMENTS
        return all_are_busy and tokens * elements <= MOST_MULTIPLICATIONS.get(self._all_fc1.dtype, 0)

    def _all_experts(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """[t, h] through all experts: the weight of those that a token has not chosen is zero."""
        count, tokens = len(self._all_fc1), len(x)
        of_all = weights.new_zeros(tokens, count).scatter_(1, experts, weights).t().flatten()
        gate_and_up = torch.bmm(x.expand(count, -1, -1), self._all_fc1).flatten(0, 1)
        activated = WeightedSwiGLU.compute(gate_and_up, of_all).view(count, tokens, -1)
        return torch.bmm(activated, self._all_fc2).sum(dim=0)

    def _routed(self, x: Tensor, counts: list[int], weights: Tensor) -> Tensor:
        """Outputs of experts, weighted: rows `x` [n, h] by expert, of which each has `counts` -> [n, h]."""
        fc1, fc2 = self._experts.linear_fc1, self._experts.linear_fc2
        if not self._is_plain or x.size(0) > cpu_gemm.FEW_ROWS * len(counts):
            activated = WeightedSwiGLU.compute(fc1.kernel.fprop(x, fc1.weight, counts, False), weights)
            return fc2.kernel.fprop(activated, fc2.weight, counts, False)
        # A grouped GEMM of torch on a CPU calls a GEMM for each group, also for those without rows.
        filled = [expert for expert, count in enumerate(counts) if count]
        sizes = [counts[expert] for expert in filled]
        rows = zip(filled, x.split(sizes), strict=True)
        gate_and_up = torch.cat([cpu_gemm.matmul_few_rows(own, self._fc1[expert]) for expert, own in rows])
        activated_rows = WeightedSwiGLU.compute(gate_and_up, weights).split(sizes)
        pairs = zip(filled, activated_rows, strict=True)
        return torch.cat([cpu_gemm.matmul_few_rows(own, self._fc2[expert]) for expert, own in pairs])

    def _shared_experts(self, x: Tensor) -> Tensor:
        assert self._shared is not None
        output = self._shared(x)
        return output if self._gate is None else output * torch.sigmoid(x @ self._gate)
