"""QK-Clip (MuonClip, Kimi K2, arXiv 2507.20534, section 2.1): keeps attention logits from growing without bound.

After an update, a head whose largest logit of the step exceeds the threshold t gets projections that are smaller by the
factor g = t / logit in all. Where queries and keys belong to that head alone, g is split between them: g^alpha and
g^(1-alpha). What heads share stays: the rotary key of multi-head latent attention, and the keys of grouped queries.
There the query takes all of g. No other head changes.

Megatron-Core has `clip_qk` (transformer/attention.py, multi_latent_attention.py). It takes the fp32 weights of a rank
for whole ones, which they are not with the distributed optimizer, and rescales all heads of a group alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as ps
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from torch import Tensor, nn

from moe_train.config.model import ModelConfig
from moe_train.config.optimizer import OptimizerConfig
from moe_train.model.layers import layer_index


@dataclass(frozen=True)
class ClippedLogits:
    """What a step measured.

    Args:
        largest: over all heads and layers.
        heads: number of heads that were rescaled.
    """

    largest: float
    heads: int


class QKClip:
    """Measures the largest attention logit of each head, and rescales projections. Every rank calls it.

    Args:
        chunks: of this rank, with DDP around them.
        optimizer: whose fp32 weights are rescaled too.
    """

    def __init__(
        self, chunks: list[Any], optimizer: Any, model: ModelConfig, options: OptimizerConfig, device: torch.device
    ) -> None:
        if options.qk_clip_threshold is None:
            raise ValueError("qk_clip_threshold is not set")
        self._threshold, self._alpha = options.qk_clip_threshold, options.qk_clip_alpha
        self._model, self._device, self._optimizer = model, device, optimizer
        self._attentions = [
            (layer_index(name, module, model.num_layers), module)
            for chunk in chunks
            for name, module in chunk.named_modules()
            if hasattr(getattr(module, "core_attention", None), "current_max_attn_logits")
        ]

    def start(self) -> None:
        """Forget what was recorded before this step, as in an evaluation with Transformer Engine."""
        for _, attention in self._attentions:
            attention.core_attention.current_max_attn_logits = None

    @torch.no_grad()
    def finish(self, updated: bool) -> ClippedLogits:
        """After the update of a step, or after a step without one, in which weights stay."""
        logits = self._gather()
        factors = (self._threshold / logits).clamp(max=1.0)
        factors[~(logits > self._threshold)] = 1.0
        if updated:
            for layer, attention in self._attentions:
                if bool((factors[layer] < 1).any()):
                    for parameter, rows in self._rows(attention, factors[layer]):
                        self._scale(parameter, rows)
        return ClippedLogits(float(logits.max()), int((factors < 1).sum()) if updated else 0)

    def _gather(self) -> Tensor:
        """Largest logit of each head [layers, heads] over all ranks and micro-batches."""
        model = self._model
        shape = (model.num_layers + model.mtp_num_layers, model.num_attention_heads)
        logits = torch.full(shape, -math.inf, device=self._device)
        for layer, attention in self._attentions:
            own = attention.core_attention.current_max_attn_logits
            if own is not None:
                first = ps.get_tensor_model_parallel_rank() * own.numel()
                logits[layer, first : first + own.numel()] = own
        dist.all_reduce(logits, op=dist.ReduceOp.MAX)
        return logits

    def _rows(self, attention: Any, factors: Tensor) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Parameters that the factors [heads] rescale, each with a factor for each of its rows on this rank."""
        if isinstance(attention, MLASelfAttention):
            model = self._model
            query = attention.linear_q_up_proj if model.q_lora_rank else attention.linear_q_proj
            own, rope = factors**self._alpha, factors
            key = factors ** (1 - self._alpha)
            yield query.weight, _of_this_rank(own, model.qk_nope_head_dim, rope, model.qk_rope_head_dim)
            rest = torch.ones_like(key)
            yield attention.linear_kv_up_proj.weight, _of_this_rank(key, model.qk_nope_head_dim, rest, model.v_head_dim)
            return
        rows = self._fused_rows(factors)
        for parameter in attention.linear_qkv.parameters(recurse=False):
            if getattr(parameter, "tensor_model_parallel", False):  # Transformer Engine's layer has the norm in it
                yield parameter, rows

    def _fused_rows(self, factors: Tensor) -> Tensor:
        """Of the fused projection: for each key/value head its queries, key and value (transformer/attention.py)."""
        groups = factors.view(self._model.kv_heads, -1)
        alone = groups.size(1) == 1
        query = groups**self._alpha if alone else groups
        key = groups ** (1 - self._alpha) if alone else groups.new_ones(len(groups), 1)
        heads = torch.cat([query, key, torch.ones_like(key)], dim=1)
        return _share(heads.flatten().repeat_interleave(self._model.attention_head_dim))

    def _scale(self, parameter: nn.Parameter, rows: Tensor) -> None:
        """Multiply rows of a weight [rows, inputs] or bias [rows], and of its fp32 weights."""
        whole = rows.view(-1, *[1] * (parameter.dim() - 1)).expand(parameter.shape)
        parameter.copy_(parameter.float() * whole)
        main = getattr(parameter, "main_param", None)
        if main is None or main.data_ptr() == parameter.data_ptr():
            return
        place = self._shard(parameter)
        main.mul_(whole if place is None else whole.reshape(-1)[place].view(main.shape))

    def _shard(self, parameter: nn.Parameter) -> slice | None:
        """The numbers of a parameter whose fp32 weights this rank has; None where it has all."""
        for part in getattr(self._optimizer, "chained_optimizers", [self._optimizer]):
            if isinstance(part, DistributedOptimizer) and parameter in part.model_param_gbuf_map:
                own = part._get_model_param_range_map(parameter)["param"]
                return slice(own.start, own.end)
        return None


def _of_this_rank(first: Tensor, first_rows: int, second: Tensor, second_rows: int) -> Tensor:
    """Factors of this rank's rows of a projection whose heads [heads] have two parts each."""
    parts = [x.view(-1, 1).expand(-1, n) for x, n in ((first, first_rows), (second, second_rows))]
    return _share(torch.cat(parts, dim=1).flatten())


def _share(rows: Tensor) -> Tensor:
    """This tensor-parallel rank's share of the rows."""
    return rows.chunk(ps.get_tensor_model_parallel_world_size())[ps.get_tensor_model_parallel_rank()]
