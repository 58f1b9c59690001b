"""Transformer layers of the `local` backend in a forward pass with the KV cache, without gradients.

Few tokens are computed at a time, so what a step costs is largely the Python code and the number of operations around
the GEMMs. The layers of Megatron-Core do much there that only training needs. Here their modules are called one after
the other, and MoE layers whose experts are all on this rank sort tokens in a few operations.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor

from moe_train.model.local.cached_attention import CacheContext, Rotary, project
from moe_train.model.local.experts import GroupedExperts
from moe_train.model.local.swiglu import SwiGLU, WeightedSwiGLU


def run_layers(layers: Iterable[Any], hidden: Tensor, context: CacheContext, rotary: Rotary | None) -> Tensor:
    """hidden [t / tp, h] -> the same shape. Each layer is `TransformerLayer` with the specs of `LocalBackend`.

    Args:
        rotary: cosine and sine of each token for grouped-query attention; latent attention has its own.
    """
    for layer in layers:
        normed = layer.input_layernorm(hidden)
        attention, _ = layer.self_attention(normed, inference_context=context, rotary_pos_emb=rotary)
        hidden = hidden + attention
        hidden = hidden + _feed_forward(layer.mlp, layer.pre_mlp_layernorm(hidden))
    return hidden


def _feed_forward(mlp: Any, x: Tensor) -> Tensor:
    """Of one layer: [t / tp, h] -> the same shape."""
    if not isinstance(mlp, MoELayer):
        return _dense(mlp, x)
    if mlp.config.expert_model_parallel_size == mlp.config.tensor_model_parallel_size == 1:
        return _experts_on_this_rank(mlp, x)
    output, _ = mlp(x.unsqueeze(1))
    result: Tensor = output.squeeze(1)
    return result


def _dense(mlp: Any, x: Tensor) -> Tensor:
    """A SwiGLU feed-forward, or shared experts."""
    if not isinstance(mlp.activation_func, SwiGLU):
        output, bias = mlp(x.unsqueeze(1))
        output = output.squeeze(1)
        result: Tensor = output if bias is None else output + bias
        return result
    return project(mlp.linear_fc2, SwiGLU.compute(project(mlp.linear_fc1, x)))


def _experts_on_this_rank(moe: Any, x: Tensor) -> Tensor:
    """An MoE layer: router, routed experts and shared experts."""
    weights, experts = moe.router.chosen_experts(x)
    experts, order = experts.flatten().sort()
    token = order // weights.size(1)
    counts = torch.bincount(experts, minlength=moe.num_local_experts)
    output = _grouped(moe.experts, x.index_select(0, token), counts, weights.flatten().index_select(0, order))
    return _shared_experts(moe, x).index_add_(0, token, output)


def _grouped(experts: Any, x: Tensor, counts: Tensor, weights: Tensor) -> Tensor:
    """Outputs of experts, weighted: rows `x` [n, h] by expert, of which each has `counts` -> [n, h]."""
    if not isinstance(experts, GroupedExperts):
        output: Tensor = experts(x, counts, weights)[0]
        return output
    rows = counts.tolist()
    fc1, fc2 = experts.linear_fc1, experts.linear_fc2
    activated = WeightedSwiGLU.compute(fc1.kernel.fprop(x, fc1.weight, rows, False), weights)
    return fc2.kernel.fprop(activated, fc2.weight, rows, False)


def _shared_experts(moe: Any, x: Tensor) -> Tensor:
    """Their output, zeros where there are none: [t, h]."""
    if not moe.use_shared_expert:
        return torch.zeros_like(x)
    output, shared = _dense(moe.shared_experts, x), moe.shared_experts
    return output * torch.sigmoid(x @ shared.gate_weight.t()) if shared.use_shared_expert_gate else output
