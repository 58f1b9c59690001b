"""Attention of the `local` backend: torch's scaled-dot-product attention, with context parallelism.

Upstream's `DotProductAttention` builds the whole score matrix, takes one head size for keys and values (multi-latent
attention has two) and refuses context parallelism.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.parallel_state import get_context_parallel_group
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from moe_train.model.kernels import gemm
from parallel.errors import ConfigError
from parallel.planner.workload import SHORT_TOKENS, query_block


class CoreAttention(nn.Module):
    """softmax(q k^T * scale) v, causal, over the whole sequence or within each of its documents.

    With `qk_clip` it records the largest logit of each head [n] in training, under the name that Transformer Engine's
    module has in Megatron-Core. The reader resets it to None.

    With context parallelism, rank r of c holds the 1/(2c) slices r and 2c-1-r of the sequence (zig-zag, as upstream
    splits it, so that causal work is even). Keys and values are gathered from all ranks; queries stay.
    """

    def __init__(
        self, config: Any, layer_number: int, attn_mask_type: Any, attention_type: str,
        softmax_scale: float | None = None, k_channels: int | None = None, **_: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.scale = softmax_scale or 1.0 / math.sqrt(k_channels or config.kv_channels)
        self.cp = config.context_parallel_size
        self.records_logits: bool = config.qk_clip
        self.current_max_attn_logits: Tensor | None = None

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
        attn_mask_type: Any = None, attention_bias: Tensor | None = None, packed_seq_params: Any = None,
    ) -> Tensor:  # fmt: skip
        """`query` [s, b, n, d], `key` [s, b, g, d], `value` [s, b, g, dv] -> [s, b, n * dv].

        With `packed_seq_params` of format thd: [t, n, d], [t, g, d], [t, g, dv] -> [t, n * dv], where documents follow
        one another.

        Raises:
            ConfigError: for an explicit mask, a bias, or packed documents under context parallelism.
        """
        if attention_mask is not None or attention_bias is not None or (self.cp > 1 and packed_seq_params is not None):
            raise ConfigError(
                "backend.name=local attends causally, and within documents only without context parallelism",
                "set backend.name=te on cuda, or data.reset_at_eod=false",
            )
        if packed_seq_params is not None:
            lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
            documents = zip(*(x.unsqueeze(1).split(lengths) for x in (query, key, value)), strict=True)
            return torch.cat([self._causal(*document) for document in documents]).squeeze(1)
        if self.cp == 1:
            return self._causal(query, key, value)
        repeat = query.size(2) // key.size(2)
        key, value = (_expand(self._gather_sequence(x), repeat) for x in (key, value))
        rank, part = get_context_parallel_group().rank(), query.size(0) // 2
        outputs = []
        for queries, index in zip(query.split(part), (rank, 2 * self.cp - 1 - rank), strict=True):
            seen = (index + 1) * part
            self._record(queries, key[:seen])
            allowed = torch.ones(part, seen, dtype=torch.bool, device=query.device).tril(diagonal=index * part)
            outputs.append(self._attend(queries, key[:seen], value[:seen], allowed))
        return torch.cat(outputs)

    def last_queries(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Causal attention of the last tokens of a sequence: `query` [s, b, n, d], `key` [k, b, g, d], `value`
        [k, b, g, dv] -> [s, b, n * dv], where s <= k. Without context parallelism, whose ranks each have all of it."""
        if len(query) == len(key):
            return self._causal(query, key, value)
        repeat = query.size(2) // key.size(2)
        allowed = torch.ones(len(query), len(key), dtype=torch.bool, device=query.device)
        allowed = allowed.tril(diagonal=len(key) - len(query))
        return self._attend(query, _expand(key, repeat), _expand(value, repeat), allowed)

    def _causal(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[s, b, n or g, *] in, [s, b, n * dv] out."""
        repeat = query.size(2) // key.size(2)
        key, value = _expand(key, repeat), _expand(value, repeat)
        self._record(query, key)
        if query.device.type == "cpu" and len(query) <= SHORT_TOKENS:
            short: Tensor = ShortAttention.apply(query, key, value, self.scale)
            return short
        return self._attend(query, key, value, None)

    @torch.no_grad()
    def _record(self, query: Tensor, key: Tensor) -> None:
        """Take the logits of the last tokens of a sequence into account: `query` [s, b, n, d], `key` [k, b, n, d]."""
        if not (self.records_logits and self.training):
            return
        largest = largest_logits(query, key, self.scale)
        before = self.current_max_attn_logits
        self.current_max_attn_logits = largest if before is None else torch.maximum(before, largest)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None) -> Tensor:
        """[s, b, n, *] in, [s, b, n * dv] out. Values are padded to the key size: with unequal sizes torch falls back
        to the kernel that materialises the scores."""
        d, dv = key.size(-1), value.size(-1)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, F.pad(value, (0, d - dv)) if d > dv else value))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, is_causal=allowed is None, scale=self.scale)
        return out[..., :dv].permute(2, 0, 1, 3).flatten(2)

    def _gather_sequence(self, x: Tensor) -> Tensor:
        """This rank's two slices [s/cp, ...] -> the whole sequence in natural order [s, ...]."""
        gathered = gather_from_sequence_parallel_region(x, group=get_context_parallel_group())
        slices = gathered.chunk(2 * self.cp)  # order: 0, 2c-1, 1, 2c-2, ...
        return torch.cat([*slices[::2], *slices[1::2][::-1]])


def largest_logits(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Largest scaled logit of each head under a causal mask, in blocks of queries: no whole matrix of scores exists.

    `query` [s, b, n, d] of the last tokens, `key` [k, b, n, d] -> [n] in fp32.
    """
    q, k = (x.permute(1, 2, 0, 3) for x in (query, key))
    before, block = k.size(2) - q.size(2), query_block(q.element_size())
    largest = torch.full((q.size(1),), -math.inf, device=q.device)
    for start in range(0, q.size(2), block):
        end = min(start + block, q.size(2))
        scores = q[:, :, start:end] @ k[:, :, : before + end].transpose(2, 3)
        future = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).triu(diagonal=before + start + 1)
        largest = torch.maximum(largest, scores.masked_fill_(future, -math.inf).amax(dim=(0, 2, 3)).float())
    return largest * scale


class ShortAttention(torch.autograd.Function):
    """Causal attention that keeps the probabilities for the backward pass, in blocks of queries.

    A block of `query_block` queries attends to the keys up to its own end, so no score above the diagonal block is
    computed. Torch's flash kernel takes up to twice as long on a CPU on sequences this short.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """[s, b, n, *] each -> [s, b, n * dv]."""
        s, b, n, _ = query.shape
        q, k, v = (x.reshape(s, b * n, -1).transpose(0, 1) for x in (query, key, value))
        block = query_block(q.element_size())
        forbidden = torch.full((block, block), -math.inf, dtype=q.dtype, device=q.device).triu_(1)
        out = v.new_empty(s, b * n, v.size(2))
        unused = q.new_empty(1)  # baddbmm reads its first argument only where beta is not 0
        probabilities = []
        for start in range(0, s, block):
            end = min(start + block, s)
            keys = k[:, :end].transpose(1, 2)
            scores = torch.baddbmm(unused, q[:, start:end], keys, beta=0, alpha=scale)
            scores[:, :, start:].add_(forbidden[: end - start, : end - start])
            probabilities.append(torch.softmax(scores, dim=-1))
            out[start:end] = torch.bmm(probabilities[-1], v[:, :end]).transpose(0, 1)
        ctx.save_for_backward(q, k, v, *probabilities)
        ctx.scale, ctx.shape, ctx.block = scale, (s, b, n, -1), block
        return out.view(s, b, -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *probabilities = ctx.saved_tensors
        s, block = ctx.shape[0], ctx.block
        g = grad.reshape(s, q.size(0), -1).transpose(0, 1)
        grad_q = q.new_empty(s, q.size(0), q.size(2))
        grad_k, grad_v = torch.zeros_like(k), torch.zeros_like(v)
        for start, probs in zip(range(0, s, block), probabilities, strict=True):
            end = min(start + block, s)
            grad_block = g[:, start:end]
            grad_v[:, :end] += torch.bmm(probs.transpose(1, 2), grad_block)
            grad_probs = torch.bmm(grad_block, v[:, :end].transpose(1, 2))
            grad_scores = torch._softmax_backward_data(grad_probs, probs, -1, probs.dtype).mul_(ctx.scale)
            grad_q[start:end] = torch.bmm(grad_scores, k[:, :end]).transpose(0, 1)
            grad_k[:, :end] += torch.bmm(grad_scores.transpose(1, 2), q[:, start:end])
        keys_and_values = (x.transpose(0, 1).reshape(ctx.shape) for x in (grad_k, grad_v))
        return grad_q.view(ctx.shape), *keys_and_values, None


class ReplicatedLinear(nn.Module):
    """A linear layer that every tensor-parallel rank holds whole and applies to its own part of the sequence."""

    kernel = gemm.HIGH_PRECISION

    def __init__(self, input_size: int, output_size: int, config: Any) -> None:
        super().__init__()
        weight = torch.empty(output_size, input_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        self.weight = nn.Parameter(config.init_method(weight))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """[s/tp, b, input_size] -> [s/tp, b, output_size], and no bias."""
        return gemm.linear(x, self.weight, self.kernel), None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The weight, replicated over tensor-parallel ranks, under the name that Transformer Engine's layer has."""
        return make_sharded_tensors_for_checkpoint(self.state_dict(keep_vars=True), prefix, {}, sharded_offsets)


class SpecifiedLatentAttention(MLASelfAttention):
    """Upstream's, with the modules of its spec unchanged. This is the one for Transformer Engine.

    From 0.19 upstream checks the position of norms again: a query that is not compressed would get a second norm of the
    hidden state, fused with its projection, which no released model has (transformer/mla_qk_norm_config.py).
    """

    def _resolve_qk_norm_config(self, submodules: Any) -> dict[str, Any]:
        names = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj", "q_layernorm", "kv_layernorm")
        return {name: getattr(submodules, name) for name in names}


class MultiLatentAttention(SpecifiedLatentAttention):
    """Upstream's, with its down-projections replicated over tensor-parallel ranks, as Transformer Engine has them.

    Upstream's local spec splits them by columns and gathers the result, whose backward pass does not add up what the
    heads on other ranks contribute to the shared rotary key: the gradient of `linear_kv_down_proj` came out 5 % wrong
    at tp=2 (megatron/core/transformer/multi_latent_attention.py, `gather_from_tensor_model_parallel_region`).
    """

    down_projection = ReplicatedLinear

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        rope = config.qk_pos_emb_head_dim
        self.linear_kv_down_proj = self.down_projection(config.hidden_size, config.kv_lora_rank + rope, config)
        if config.q_lora_rank is not None:
            self.linear_q_down_proj = self.down_projection(config.hidden_size, config.q_lora_rank, config)


def _expand(x: Tensor, repeat: int) -> Tensor:
    """[s, b, g, d] -> [s, b, g * repeat, d]: each key/value head serves `repeat` query heads."""
    return x if repeat == 1 else x.repeat_interleave(repeat, dim=2)
