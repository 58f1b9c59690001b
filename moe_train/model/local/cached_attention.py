"""Attention of the `local` backend over a paged KV cache.

The batch is [t, 1, h]: tokens of many sequences, those of sequences with one token first (they decode). Each layer
writes what it keeps of all tokens to its cache, and then attends to what the cache has of each sequence.

Multi-head latent attention has two ways to the same result (arXiv 2405.04434, section 2.1.2). The plain one computes
keys and values of all heads from the latents. The absorbed one multiplies the queries by the key up-projection instead,
attends to the latents themselves, and multiplies the result by the value up-projection. A token that decodes then does
not expand the latents of all earlier tokens.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from megatron.core.models.common.embeddings import apply_rotary_pos_emb
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import _yarn_get_concentration_factor_from_config
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from moe_train.model.kernels import gemm

# From 0.19 upstream's function asks whether to reorder the rotary dimensions of latent attention. Before, it takes the
# answer from the config (models/common/embeddings/rope_utils.py).
_INTERLEAVED = "mla_rotary_interleaved"
_OF_LATENT = {_INTERLEAVED: True} if _INTERLEAVED in inspect.signature(apply_rotary_pos_emb).parameters else {}


@dataclass(frozen=True)
class Prefill:
    """Several tokens of one sequence.

    Args:
        rows: of the batch.
        slots: in the cache, [k], of all tokens of the sequence up to the last of `rows`.
    """

    rows: slice
    slots: Tensor

    @property
    def starts_sequence(self) -> bool:
        """Whether the tokens are the first of their sequence."""
        return len(self.slots) == self.rows.stop - self.rows.start


class LayerStore(Protocol):
    """The cache of one layer."""

    @property
    def is_exact(self) -> bool:
        """Whether what is read is what was written."""
        ...

    def write(self, slots: Tensor, **parts: Tensor) -> None:
        """Store [t, heads, width] of each part."""
        ...

    def read(self, name: str, slots: Tensor) -> Tensor:
        """[..., heads, width] of `slots` [...]."""
        ...


class CacheContext(Protocol):
    """A forward pass with the cache, of `num_tokens` tokens and a few that pad the batch."""

    num_tokens: int
    num_decode: int
    slots: Tensor
    decode_slots: Tensor
    decode_mask: Tensor
    prefills: list[Prefill]

    def layer(self, number: int) -> LayerStore:
        """The cache of a layer."""
        ...

    def rotary_angles(self, rotary: Any) -> tuple[Tensor, float]:
        """Angles [t, 1, 1, rotary dimensions] of the tokens, and the factor on their cosine and sine."""
        ...


def absorption_is_cheaper(queries: int, keys: int, latent: int, nope: int, rope: int, value: int) -> bool:
    """Whether the absorbed way takes fewer multiplications of one head, for `queries` that attend to `keys` tokens."""
    plain = keys * latent * (nope + value) + queries * keys * (nope + rope + value)
    absorbed = queries * latent * (nope + value) + queries * keys * (2 * latent + rope)
    return absorbed < plain


def latent_attention(attention: Any, hidden: Tensor, context: CacheContext) -> tuple[Tensor, Tensor | None]:
    """Multi-head latent attention: hidden [t / tp, 1, h] -> the same shape, and no bias.

    Args:
        attention: Megatron-Core's module, whose weights and norms it uses.
    """
    queries, latent, rotary_key = _latent_projections(attention, hidden, context)
    count, store = context.num_tokens, context.layer(attention.layer_number)
    store.write(context.slots, latent=latent[:count].unsqueeze(1), rotary_key=rotary_key[:count].unsqueeze(1))
    out = queries.new_zeros(*queries.shape[:2], attention.config.v_head_dim)
    if context.num_decode:
        rows = slice(0, context.num_decode)
        keys = _latent_keys(store, context.decode_slots)
        out[rows] = _decode_absorbed(attention, queries[rows], keys, context.decode_mask)
    for prefill in context.prefills:
        rows = prefill.rows
        if store.is_exact and prefill.starts_sequence:
            keys = torch.cat([latent[rows], rotary_key[rows]], dim=-1)
        else:
            keys = _latent_keys(store, prefill.slots)
        out[rows] = _latent_prefill(attention, queries[rows], keys)
    output: tuple[Tensor, Tensor | None] = attention.linear_proj(out.flatten(1).unsqueeze(1))
    return output


def grouped_attention(
    attention: Any, hidden: Tensor, rotary: Tensor, context: CacheContext
) -> tuple[Tensor, Tensor | None]:
    """Grouped-query attention: hidden [t / tp, 1, h] -> the same shape, and the bias of the output projection.

    Args:
        rotary: angles of each token's position, [t, 1, 1, rotary dimensions].
    """
    queries, keys, values = attention.get_query_key_value_tensors(hidden, None)
    scale = _yarn_get_concentration_factor_from_config(attention.config)
    queries, keys = (_rotated(attention, x, rotary, scale).squeeze(1) for x in (queries, keys))
    values = values.squeeze(1)
    count, store = context.num_tokens, context.layer(attention.layer_number)
    store.write(context.slots, key=keys[:count], value=values[:count])
    out = torch.zeros_like(queries)
    if context.num_decode:
        rows, slots = slice(0, context.num_decode), context.decode_slots
        out[rows] = _decode_grouped(
            queries[rows], store.read("key", slots), store.read("value", slots), context.decode_mask,
            attention.core_attention.scale,
        )  # fmt: skip
    for prefill in context.prefills:
        rows = prefill.rows
        own = (keys[rows], values[rows])
        if not (store.is_exact and prefill.starts_sequence):
            own = (store.read("key", prefill.slots), store.read("value", prefill.slots))
        out[rows] = _prefill(attention, queries[rows], *own)
    output: tuple[Tensor, Tensor | None] = attention.linear_proj(out.flatten(1).unsqueeze(1))
    return output


def _latent_projections(attention: Any, hidden: Tensor, context: CacheContext) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [t, heads, nope + rope], normed latents [t, latent] and rotary keys [t, rope], rotated.

    As upstream computes them before its up-projection (transformer/multi_latent_attention.py,
    `get_query_key_value_tensors`).
    """
    config = attention.config
    if config.q_lora_rank is not None:
        queries, _ = attention.linear_q_up_proj(attention.q_layernorm(attention.linear_q_down_proj(hidden)[0]))
    else:
        queries, _ = attention.linear_q_proj(hidden)
    queries = queries.view(*queries.shape[:2], -1, attention.q_head_dim)
    combined, _ = attention.linear_kv_down_proj(hidden)
    latent, rotary_key = combined.split([config.kv_lora_rank, config.qk_pos_emb_head_dim], dim=-1)
    latent = attention.kv_layernorm(latent)
    if config.sequence_parallel:
        latent, rotary_key = (
            gather_from_sequence_parallel_region(x.contiguous(), group=attention.tp_group) for x in (latent, rotary_key)
        )
    angles, scale = context.rotary_angles(attention.rotary_pos_emb)
    nope, rotary = queries.split([config.qk_head_dim, config.qk_pos_emb_head_dim], dim=-1)
    queries = torch.cat([nope, _rotated(attention, rotary, angles, scale, _OF_LATENT)], dim=-1)
    rotary_key = _rotated(attention, rotary_key.unsqueeze(2), angles, scale, _OF_LATENT)
    return queries.squeeze(1), latent.squeeze(1), rotary_key.flatten(1)


def _rotated(attention: Any, x: Tensor, angles: Tensor, scale: float, options: dict[str, bool] | None = None) -> Tensor:
    """`x` [t, 1, heads, d], rotated by `angles` [t, 1, 1, rotary dimensions]."""
    group, options = attention.pg_collection.cp, options or {}
    rotated: Tensor = apply_rotary_pos_emb(x, angles, config=attention.config, mscale=scale, cp_group=group, **options)
    return rotated


def _latent_keys(store: LayerStore, slots: Tensor) -> Tensor:
    """Latents and rotary keys of `slots` [...]: [..., latent + rope]."""
    return torch.cat([store.read("latent", slots), store.read("rotary_key", slots)], dim=-1).squeeze(-2)


def _up_projections(attention: Any) -> tuple[Tensor, Tensor]:
    """Of keys [heads, nope, latent], and of values [heads, value, latent]: views of the weight."""
    config = attention.config
    weight = attention.linear_kv_up_proj.weight.view(-1, config.qk_head_dim + config.v_head_dim, config.kv_lora_rank)
    key, value = weight.split([config.qk_head_dim, config.v_head_dim], dim=1)
    return key, value


def _absorb(attention: Any, queries: Tensor) -> Tensor:
    """Queries [t, heads, nope + rope] for keys that are latents: [heads, t, latent + rope]."""
    widths = [attention.config.qk_head_dim, attention.config.qk_pos_emb_head_dim]
    nope, rotary = queries.transpose(0, 1).split(widths, dim=-1)
    return torch.cat([torch.bmm(nope, _up_projections(attention)[0]), rotary], dim=-1)


def _decode_absorbed(attention: Any, queries: Tensor, keys: Tensor, mask: Tensor) -> Tensor:
    """[n, heads, nope + rope], keys [n, k, latent + rope], mask [n, k] -> [n, heads, value]."""
    absorbed = _absorb(attention, queries).transpose(0, 1)
    mixed = _mix(
        absorbed, keys, keys[..., : attention.config.kv_lora_rank], mask.unsqueeze(1), attention.core_attention.scale
    )
    return torch.bmm(mixed.transpose(0, 1), _up_projections(attention)[1].mT).transpose(0, 1)


def _latent_prefill(attention: Any, queries: Tensor, keys: Tensor) -> Tensor:
    """Causal attention of the last tokens of a sequence: [s, heads, nope + rope], keys [k, latent + rope] ->
    [s, heads, value], in the cheaper of the two ways."""
    config, heads = attention.config, queries.size(1)
    latent, nope, rope, value = (
        config.kv_lora_rank, config.qk_head_dim, config.qk_pos_emb_head_dim, config.v_head_dim,
    )  # fmt: skip
    if absorption_is_cheaper(len(queries), len(keys), latent, nope, rope, value):
        absorbed, shared = _absorb(attention, queries).flatten(0, 1).unsqueeze(0), keys.unsqueeze(0)
        mask = _causal_mask(len(queries), len(keys), keys).repeat(1, heads, 1)
        mixed = _mix(absorbed, shared, shared[..., :latent], mask, attention.core_attention.scale).view(
            heads, len(queries), latent
        )
        return torch.bmm(mixed, _up_projections(attention)[1].mT).transpose(0, 1)
    up = gemm.linear(keys[:, :latent], attention.linear_kv_up_proj.weight).view(len(keys), heads, nope + value)
    rotary = keys[:, None, latent:].expand(-1, heads, -1)
    return _prefill(attention, queries, torch.cat([up[..., :nope], rotary], dim=-1), up[..., nope:])


def _mix(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
    """softmax(queries keys^T * scale + mask) values: [b, m, c], [b, k, c], [b, k, d] -> [b, m, d]."""
    scores = torch.baddbmm(mask.to(queries), queries, keys.mT, alpha=scale)
    return torch.bmm(scores.softmax(dim=-1), values)


def _causal_mask(queries: int, keys: int, like: Tensor) -> Tensor:
    """Added to the scores of the last `queries` of `keys` tokens: [1, queries, keys]."""
    mask = torch.full((queries, keys), -torch.inf, dtype=like.dtype, device=like.device)
    return mask.triu_(keys - queries + 1).unsqueeze(0)


def _prefill(attention: Any, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Causal attention of the last tokens of a sequence: [s, n, d], [k, g, d], [k, g, dv] -> [s, n, dv]."""
    out: Tensor = attention.core_attention.last_queries(*(x.unsqueeze(1) for x in (queries, keys, values)))
    return out.view(*queries.shape[:2], values.size(-1))


def _decode_grouped(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
    """[n, heads, d], keys and values [n, k, groups, d], mask [n, k] -> [n, heads, d]."""
    n, heads, d = queries.shape
    groups = keys.size(2)
    q = queries.view(n * groups, heads // groups, d)
    k, v = (x.transpose(1, 2).flatten(0, 1) for x in (keys, values))
    return _mix(q, k, v, mask.repeat_interleave(groups, dim=0).unsqueeze(1), scale).view(n, heads, d)
