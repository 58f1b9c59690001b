"""Attention of the `local` backend over a paged KV cache.

The batch is [t, h]: tokens of many sequences, those of sequences with one token first (they decode). Each layer writes
what it keeps of all tokens to its cache, and then attends to what the cache has of each sequence.

Multi-head latent attention has two ways to the same result (arXiv 2405.04434, section 2.1.2). The plain one computes
keys and values of all heads from the latents. The absorbed one multiplies the queries by the key up-projection instead,
attends to the latents themselves, and multiplies the result by the value up-projection. A token that decodes then does
not expand the latents of all earlier tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from moe_train.model.kernels import gemm

Slots = slice | Tensor
"""Places in the cache: consecutive ones, or any [...]."""
Rotary = tuple[Tensor, Tensor]
"""Cosine and sine of the angles of each token, [t, 1, rotary dimensions], in the precision of the model."""


@dataclass(frozen=True)
class Prefill:
    """Several tokens of one sequence.

    Args:
        rows: of the batch.
        num_keys: tokens of the sequence up to the last of `rows`.
        slots: their places in the cache, in order.
    """

    rows: slice
    num_keys: int
    slots: Slots

    @property
    def starts_sequence(self) -> bool:
        """Whether the tokens are the first of their sequence."""
        return self.num_keys == self.rows.stop - self.rows.start


@dataclass(frozen=True)
class Gathered:
    """Places of all tokens that the decoding sequences attend to, to be copied into one tensor.

    Args:
        slots: [n, k].
        mask: [n, 1, k], added to the scores.
    """

    slots: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Decoding:
    """Where the tokens are that the decoding sequences attend to, in one of two ways.

    Args:
        gathered: all of them together.
        pieces: for each sequence: its longest run of consecutive places, and the other places, if any. Attention then
            reads the run where it is.
    """

    count: int
    gathered: Gathered | None
    pieces: list[list[Slots]]


class LayerStore(Protocol):
    """The cache of one layer."""

    @property
    def is_exact(self) -> bool:
        """Whether what is read is what was written."""
        ...

    def write(self, slots: Tensor, **parts: Tensor) -> None:
        """Store [t, heads, width] of each part."""
        ...

    def read(self, name: str, slots: Slots) -> Tensor:
        """[..., heads, width] of `slots`."""
        ...


class CacheContext(Protocol):
    """A forward pass with the cache, of `num_tokens` tokens and a few that pad the batch."""

    num_tokens: int
    slots: Tensor
    decoding: Decoding
    prefills: list[Prefill]

    def layer(self, number: int) -> LayerStore:
        """The cache of a layer."""
        ...

    def rotary(self, module: Any, scale: float | None) -> Rotary:
        """Cosine and sine of the tokens' positions.

        Args:
            module: Megatron-Core's, which has the same settings in all layers.
            scale: factor on both; None takes that of the module.
        """
        ...


def absorption_is_cheaper(queries: int, keys: int, latent: int, nope: int, rope: int, value: int) -> bool:
    """Whether the absorbed way takes fewer multiplications of one head, for `queries` that attend to `keys` tokens."""
    plain = keys * latent * (nope + value) + queries * keys * (nope + rope + value)
    absorbed = queries * latent * (nope + value) + queries * keys * (2 * latent + rope)
    return absorbed < plain


def latent_attention(attention: Any, hidden: Tensor, context: CacheContext) -> Tensor:
    """Multi-head latent attention: hidden [t / tp, h] -> the same shape.

    Args:
        attention: Megatron-Core's module, whose weights and norms it uses.
    """
    queries, latent, rotary_key = _latent_projections(attention, hidden, context)
    count, store, decoding = context.num_tokens, context.layer(attention.layer_number), context.decoding
    store.write(context.slots, latent=latent[:count].unsqueeze(1), rotary_key=rotary_key[:count].unsqueeze(1))
    parts = []
    if decoding.count:
        parts.append(_decode_absorbed(attention, queries[: decoding.count], store, decoding))
    for prefill in context.prefills:
        rows = prefill.rows
        if store.is_exact and prefill.starts_sequence:
            keys = torch.cat([latent[rows], rotary_key[rows]], dim=-1)
        else:
            keys = torch.cat([store.read(name, prefill.slots) for name in ("latent", "rotary_key")], dim=-1).squeeze(-2)
        parts.append(_latent_prefill(attention, queries[rows], keys))
    return project(attention.linear_proj, _joined(parts, queries, attention.config.v_head_dim))


def grouped_attention(attention: Any, hidden: Tensor, rotary: Rotary, context: CacheContext) -> Tensor:
    """Grouped-query attention: hidden [t / tp, h] -> the same shape."""
    queries, keys, values = attention.get_query_key_value_tensors(hidden.unsqueeze(1), None)
    interleaved = attention.config.rotary_interleaved
    queries, keys = (rotated(x.squeeze(1), rotary, interleaved) for x in (queries, keys))
    values = values.squeeze(1)
    count, store, decoding = context.num_tokens, context.layer(attention.layer_number), context.decoding
    store.write(context.slots, key=keys[:count], value=values[:count])
    parts = []
    if decoding.count:
        parts.append(_decode_grouped(queries[: decoding.count], store, decoding, attention.core_attention.scale))
    for prefill in context.prefills:
        rows = prefill.rows
        own = (keys[rows], values[rows])
        if not (store.is_exact and prefill.starts_sequence):
            own = (store.read("key", prefill.slots), store.read("value", prefill.slots))
        parts.append(_prefill(attention, queries[rows], *own))
    return project(attention.linear_proj, _joined(parts, queries, queries.size(-1)))


def project(linear: Any, x: Tensor) -> Tensor:
    """x [t, in] through a linear layer, with its bias: [t, out], where ranks share the layer as it shards tokens."""
    weight = _plain_weight(linear)
    if weight is not None:
        return gemm.matmul_few_rows(x, weight.mT)
    output, bias = linear(x.unsqueeze(1))
    output = output.squeeze(1)
    result: Tensor = output if bias is None else output + bias
    return result


def _plain_weight(linear: Any) -> Tensor | None:
    """The weight of a layer that is a GEMM and nothing else: no collective, no bias, no other number format."""
    if getattr(linear, "kernel", None) is not gemm.HIGH_PRECISION or getattr(linear, "bias", None) is not None:
        return None
    group = getattr(linear, "tp_group", None)
    weight: Tensor = linear.weight
    return weight if group is None or group.size() == 1 else None


def _joined(parts: list[Tensor], queries: Tensor, width: int) -> Tensor:
    """Outputs [n, heads, width] of all sequences, and zeros for tokens that pad the batch: [t, heads * width]."""
    missing = len(queries) - sum(len(part) for part in parts)
    if missing:
        parts = [*parts, queries.new_zeros(missing, queries.size(1), width)]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).flatten(1)


def _latent_projections(attention: Any, hidden: Tensor, context: CacheContext) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [t, heads, nope + rope], normed latents [t, latent] and rotary keys [t, rope], rotated.

    As upstream computes them before its up-projection (transformer/multi_latent_attention.py,
    `get_query_key_value_tensors`).
    """
    config = attention.config
    if config.q_lora_rank is not None:
        compressed = attention.q_layernorm(project(attention.linear_q_down_proj, hidden))
        queries = project(attention.linear_q_up_proj, compressed)
    else:
        queries = project(attention.linear_q_proj, hidden)
    queries = queries.view(len(queries), -1, attention.q_head_dim)
    combined = project(attention.linear_kv_down_proj, hidden)
    latent, rotary_key = combined.split([config.kv_lora_rank, config.qk_pos_emb_head_dim], dim=-1)
    latent = attention.kv_layernorm(latent)
    if config.sequence_parallel:
        latent, rotary_key = (
            gather_from_sequence_parallel_region(x.contiguous(), group=attention.tp_group) for x in (latent, rotary_key)
        )
    rotary = context.rotary(attention.rotary_pos_emb, None)
    nope, rotary_queries = queries.split([config.qk_head_dim, config.qk_pos_emb_head_dim], dim=-1)
    heads = torch.cat([rotary_queries, rotary_key.unsqueeze(1)], dim=1)  # the key is rotated like one more head
    rotary_queries, rotary_key = rotated(heads, rotary, interleaved=True).split([queries.size(1), 1], dim=1)
    return torch.cat([nope, rotary_queries], dim=-1), latent, rotary_key.squeeze(1)


def rotated(x: Tensor, rotary: Rotary, interleaved: bool) -> Tensor:
    """The first dimensions of `x` [t, heads, d], as many as there are angles, rotated; the others unchanged.

    Args:
        interleaved: whether pairs are neighbours. The result has the first of all pairs, then the second, as upstream's
            `_apply_rotary_pos_emb_bshd` (models/common/embeddings/rope_utils.py) with `multi_latent_attention`.
    """
    cosine, sine = rotary  # the angles of the second half are those of the first
    half = cosine.size(-1) // 2
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    first, second = (turned[..., ::2], turned[..., 1::2]) if interleaved else turned.chunk(2, dim=-1)
    cosine, sine = cosine[..., :half], sine[..., :half]
    parts = [first * cosine - second * sine, second * cosine + first * sine]
    return torch.cat([*parts, rest] if rest.size(-1) else parts, dim=-1)


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


def _decode_absorbed(attention: Any, queries: Tensor, store: LayerStore, decoding: Decoding) -> Tensor:
    """[n, heads, nope + rope] -> [n, heads, value]."""
    latent, scale = attention.config.kv_lora_rank, attention.core_attention.scale
    absorbed = _absorb(attention, queries).transpose(0, 1)  # [n, heads, latent + rope]
    if decoding.gathered is not None:
        keys, rotary_keys = (store.read(name, decoding.gathered.slots).squeeze(-2) for name in ("latent", "rotary_key"))
        scores = torch.baddbmm(decoding.gathered.mask.to(keys), absorbed[..., :latent], keys.mT, alpha=scale)
        scores = torch.baddbmm(scores, absorbed[..., latent:], rotary_keys.mT, alpha=scale)
        mixed = torch.bmm(scores.softmax(dim=-1), keys)
    else:
        mixed = torch.stack([
            _absorbed_alone(own, store, pieces, latent, scale)
            for own, pieces in zip(absorbed, decoding.pieces, strict=True)
        ])  # fmt: skip
    return torch.bmm(mixed.transpose(0, 1), _up_projections(attention)[1].mT).transpose(0, 1)


def _absorbed_alone(queries: Tensor, store: LayerStore, pieces: list[Slots], latent: int, scale: float) -> Tensor:
    """Attention of one token to latents: [heads, latent + rope] -> [heads, latent]."""
    keys = [store.read("latent", piece).squeeze(-2) for piece in pieces]
    scores = []
    for own, piece in zip(keys, pieces, strict=True):
        rotary_keys = store.read("rotary_key", piece).squeeze(-2)
        part = torch.mm(queries[:, latent:], rotary_keys.t())
        scores.append(torch.addmm(part, queries[:, :latent], own.t(), beta=scale, alpha=scale))
    if len(keys) == 1:
        return torch.mm(scores[0].softmax(dim=-1), keys[0])
    weights = torch.cat(scores, dim=-1).softmax(dim=-1).split([len(own) for own in keys], dim=-1)
    return torch.addmm(torch.mm(weights[0], keys[0]), weights[1], keys[1])


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


def _decode_grouped(queries: Tensor, store: LayerStore, decoding: Decoding, scale: float) -> Tensor:
    """[n, heads, d] -> [n, heads, dv]."""
    n, heads, d = queries.shape
    if decoding.gathered is None:
        alone = zip(queries, decoding.pieces, strict=True)
        return torch.stack([_grouped_alone(own, store, pieces, scale) for own, pieces in alone])
    keys, values = (store.read(name, decoding.gathered.slots) for name in ("key", "value"))
    groups = keys.size(2)
    q = queries.view(n * groups, heads // groups, d)
    k, v = (x.transpose(1, 2).flatten(0, 1) for x in (keys, values))
    return _mix(q, k, v, decoding.gathered.mask.repeat_interleave(groups, dim=0), scale).view(n, heads, -1)


def _grouped_alone(queries: Tensor, store: LayerStore, pieces: list[Slots], scale: float) -> Tensor:
    """Attention of one token: [heads, d] -> [heads, dv]."""
    keys, values = ([store.read(name, piece).transpose(0, 1) for piece in pieces] for name in ("key", "value"))
    q = queries.view(keys[0].size(0), -1, queries.size(-1))  # [groups, heads / groups, d]
    scores = [torch.bmm(q, own.mT) for own in keys]
    joined = scores[0] if len(scores) == 1 else torch.cat(scores, dim=-1)
    weights = joined.mul_(scale).softmax(dim=-1)
    parts = weights.split([own.size(1) for own in keys], dim=-1)
    out = torch.bmm(parts[0], values[0])
    if len(values) > 1:
        out = torch.baddbmm(out, parts[1], values[1])
    return out.flatten(0, 1)
