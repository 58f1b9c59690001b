"""Attention of the `local` backend over a paged KV cache.

The batch is [t, h]: tokens of many sequences, first those of sequences that decode. Each layer writes what it keeps of
all tokens to its cache, and then attends to what the cache has of each sequence.

Multi-head latent attention has two ways to the same result (arXiv 2405.04434, section 2.1.2). The plain one computes
keys and values of all heads from the latents. The absorbed one multiplies the queries by the key up-projection instead,
attends to the latents themselves, and multiplies the result by the value up-projection. A token that decodes then does
not expand the latents of all earlier tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from moe_train.model.kernels import cpu_gemm, gemm
from moe_train.model.local.cached_parts import PreparedLinear, PreparedNorm

Slots = slice | Tensor
"""Places in the cache: consecutive ones, or any [...]."""


@dataclass(frozen=True)
class Rotary:
    """The angles of each token.

    Args:
        cosine, sine: [t, 1, rotary dimensions], in the precision of the model. The sine is negative for the first of
            each pair of dimensions.
        interleaved: whether pairs are neighbours; else one is in the first half, and the other in the second.
    """

    cosine: Tensor
    sine: Tensor
    interleaved: bool


@dataclass(frozen=True)
class Pieces:
    """Places of whole blocks of a sequence: its longest run of consecutive ones, which is read where it is, and others.
    The tokens of the pass are adjacent, at the end.

    Args:
        slots: one or two.
        unused: places at the end of the last that hold no token of the sequence.
        later: bool [queries, queries]: which tokens of the pass follow which; None for a single one.
    """

    slots: list[Slots]
    unused: int
    later: Tensor | None = None

    def mask(self, scores: Tensor) -> Tensor:
        """`scores` [heads * queries, k] over all places, changed in place: causal for the tokens of the pass."""
        if self.unused:
            scores[:, -self.unused :] = -torch.inf
        if self.later is not None:
            queries, end = len(self.later), scores.size(1) - self.unused
            scores.view(-1, queries, scores.size(1))[..., end - queries : end].masked_fill_(self.later, -torch.inf)
        return scores


@dataclass(frozen=True)
class Prefill:
    """Tokens of one sequence, whose keys and values may be expanded.

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
        mask: [n, s, k], added to the scores of the last `s` tokens of each sequence.
    """

    slots: Tensor
    mask: Tensor
    _of_heads: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def mask_of(self, heads: int, groups: int = 1) -> Tensor:
        """The mask for `heads` heads of each token in each of `groups` groups: [n * groups, s * heads, k], or
        [n * groups, 1, k] where it holds for all heads. All layers share it."""
        if (heads, groups) not in self._of_heads:
            mask = self.mask if self.mask.size(1) == 1 else self.mask.repeat_interleave(heads, dim=1)
            self._of_heads[heads, groups] = mask if groups == 1 else mask.repeat_interleave(groups, dim=0)
        return self._of_heads[heads, groups]


@dataclass(frozen=True)
class Decoding:
    """The last `queries` tokens of each of some sequences, and what they attend to: together or by sequence.

    The number of places is a multiple of the block size: oneDNN compiles a kernel for each size that it meets.

    Args:
        rows: of the batch, sequence by sequence.
        queries: tokens of each sequence. There are several where drafts are verified.
        gathered: of all sequences; None where each has its `pieces`.
    """

    rows: slice
    queries: int
    gathered: Gathered | None
    pieces: list[Pieces]


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
    parts: list[Decoding | Prefill]
    """All sequences, in the order of their rows."""

    def layer(self, number: int) -> LayerStore:
        """The cache of a layer."""
        ...

    @property
    def as_prefills(self) -> list[Prefill]:
        """All sequences, also those that decode, in the order of their rows."""
        ...

    def rotary(self, module: Any, scale: float | None, interleaved: bool) -> Rotary:
        """The angles of the tokens' positions.

        Args:
            module: Megatron-Core's, which has the same settings in all layers.
            scale: factor on cosine and sine; None takes that of the module.
            interleaved: whether pairs are neighbours.
        """
        ...


def absorption_is_cheaper(queries: int, keys: int, latent: int, nope: int, rope: int, value: int) -> bool:
    """Whether the absorbed way takes fewer multiplications of one head, for `queries` that attend to `keys` tokens."""
    plain = keys * latent * (nope + value) + queries * keys * (nope + rope + value)
    absorbed = queries * latent * (nope + value) + queries * keys * (2 * latent + rope)
    return absorbed < plain


class LatentAttention:
    """Multi-head latent attention: hidden [t / tp, h] -> the same shape.

    Args:
        attention: Megatron-Core's module, whose weights and norms it uses.
        number: of the layer in the cache.
    """

    def __init__(self, attention: Any, number: int) -> None:
        config = attention.config
        self._attention = attention
        self._layer_number = number
        self._scale: float = attention.core_attention.scale
        self._latent, self._rope = config.kv_lora_rank, config.qk_pos_emb_head_dim
        self._nope, self._value = config.qk_head_dim, config.v_head_dim
        self._sequence_parallel = config.sequence_parallel
        self._q_down: PreparedLinear | None = None
        if config.q_lora_rank is not None:
            self._q_down, self._q_norm = (
                PreparedLinear(attention.linear_q_down_proj),
                PreparedNorm(attention.q_layernorm),
            )
            self._q_up = PreparedLinear(attention.linear_q_up_proj)
        else:
            self._q_up = PreparedLinear(attention.linear_q_proj)
        self._kv_down, self._kv_norm = (
            PreparedLinear(attention.linear_kv_down_proj),
            PreparedNorm(attention.kv_layernorm),
        )
        self._output = PreparedLinear(attention.linear_proj)
        # In another number format the up-projection rounds latents, so that it has to run as in training.
        self._kernel: gemm.LinearKernel = attention.linear_kv_up_proj.kernel
        self._absorbs = self._kernel is gemm.HIGH_PRECISION
        up = attention.linear_kv_up_proj.weight.detach().view(-1, self._nope + self._value, self._latent)
        self._key_up = up[:, : self._nope]
        """[heads, nope, latent]"""
        self._value_up = up[:, self._nope :].mT
        """[heads, latent, value]"""

    def __call__(self, hidden: Tensor, context: CacheContext) -> Tensor:
        nope, rotary_queries, latent, rotary_key = self._projections(hidden, context)
        count, store = context.num_tokens, context.layer(self._layer_number)
        store.write(context.slots, latent=latent[:count].unsqueeze(1), rotary_key=rotary_key[:count])
        outputs = []
        for part in context.parts if self._absorbs else context.as_prefills:
            rows = part.rows
            if isinstance(part, Decoding):
                outputs.append(self._decode(nope[rows], rotary_queries[rows], store, part))
                continue
            if store.is_exact and part.starts_sequence:
                keys = torch.cat([latent[rows], rotary_key[rows].squeeze(1)], dim=-1)
            else:
                stored = [store.read(name, part.slots) for name in ("latent", "rotary_key")]
                keys = torch.cat(stored, dim=-1).squeeze(-2)
            outputs.append(self._prefill(nope[rows], rotary_queries[rows], keys))
        return self._output(_joined(outputs, nope, self._value))

    def _projections(self, hidden: Tensor, context: CacheContext) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries [t, heads, nope] and [t, heads, rope], normed latents [t, latent], rotary keys [t, 1, rope].

        As upstream computes them before its up-projection (transformer/multi_latent_attention.py,
        `get_query_key_value_tensors`).
        """
        queries = self._q_up(hidden if self._q_down is None else self._q_norm(self._q_down(hidden)))
        queries = queries.view(queries.size(0), -1, self._nope + self._rope)
        latent, rotary_key = self._kv_down(hidden).split([self._latent, self._rope], dim=-1)
        latent = self._kv_norm(latent)
        if self._sequence_parallel:
            latent, rotary_key = (
                gather_from_sequence_parallel_region(x.contiguous(), group=self._attention.tp_group)
                for x in (latent, rotary_key)
            )
        rotary = context.rotary(self._attention.rotary_pos_emb, None, True)
        nope, rotary_queries = queries.split([self._nope, self._rope], dim=-1)
        heads = torch.cat([rotary_queries, rotary_key.unsqueeze(1)], dim=1)  # the key is rotated like one more head
        rotary_queries, rotary_key = rotated(heads, rotary).split([queries.size(1), 1], dim=1)
        return nope, rotary_queries, latent, rotary_key

    def _decode(self, nope: Tensor, rotary: Tensor, store: LayerStore, part: Decoding) -> Tensor:
        """Absorbed, `s` tokens of each sequence: [n * s, heads, nope] and [n * s, heads, rope] -> [n * s, heads,
        value]."""
        s, heads = part.queries, nope.size(1)
        absorbed = torch.bmm(nope.transpose(0, 1), self._key_up)  # [heads, n * s, latent]
        if part.gathered is not None:
            keys = store.read("latent", part.gathered.slots).squeeze(-2)
            rotary_keys = store.read("rotary_key", part.gathered.slots).squeeze(-2)
            queries, rotary = (x.reshape(len(keys), s * heads, -1) for x in (absorbed.transpose(0, 1), rotary))
            scores = torch.baddbmm(part.gathered.mask_of(heads), queries, keys.mT, alpha=self._scale)
            scores = scores.baddbmm_(rotary, rotary_keys.mT, alpha=self._scale)
            mixed = torch.bmm(scores.softmax(dim=-1), keys).view(-1, heads, self._latent).transpose(0, 1)
        else:
            alone = zip(absorbed.split(s, dim=1), rotary.split(s), part.pieces, strict=True)
            each = [self._attend(a, r.transpose(0, 1), store, pieces) for a, r, pieces in alone]
            mixed = each[0] if len(each) == 1 else torch.cat(each, dim=1)
        return torch.bmm(mixed, self._value_up).transpose(0, 1)

    def _attend(self, absorbed: Tensor, rotary: Tensor, store: LayerStore, pieces: Pieces) -> Tensor:
        """Attention of the last tokens of a sequence to its latents: [heads, s, latent] and [heads, s, rope] -> [heads,
        s, latent]."""
        shape = absorbed.shape
        absorbed, rotary = (x.reshape(-1, x.size(-1)) for x in (absorbed, rotary))
        keys = [store.read("latent", slots).squeeze(-2) for slots in pieces.slots]
        rotary_keys = [store.read("rotary_key", slots).squeeze(-2) for slots in pieces.slots]
        scores = [
            cpu_gemm.attention_scores([(rotary, its_rotary), (absorbed, own)])
            for its_rotary, own in zip(rotary_keys, keys, strict=True)
        ]
        weights = pieces.mask(_joined_scores(scores).mul_(self._scale)).softmax(dim=-1)
        parts = weights.split([len(own) for own in keys], dim=-1)
        mixed = [cpu_gemm.attention_values(part, own) for part, own in zip(parts, keys, strict=True)]
        return (mixed[0] if len(mixed) == 1 else mixed[0] + mixed[1]).view(shape)

    def _prefill(self, nope: Tensor, rotary: Tensor, keys: Tensor) -> Tensor:
        """Causal attention of the last tokens of a sequence: [s, heads, nope] and [s, heads, rope], keys
        [k, latent + rope] -> [s, heads, value], in the cheaper of the two ways."""
        s, heads = nope.shape[:2]
        latents, rotary_keys = keys.split([self._latent, self._rope], dim=-1)
        sizes = self._latent, self._nope, self._rope, self._value
        if self._absorbs and absorption_is_cheaper(s, len(keys), *sizes):
            absorbed = torch.bmm(nope.transpose(0, 1), self._key_up)
            queries = torch.cat([absorbed, rotary.transpose(0, 1)], dim=-1).flatten(0, 1).unsqueeze(0)
            mask = _causal_mask(s, len(keys), keys).repeat(1, heads, 1)
            mixed = _mix(queries, keys.unsqueeze(0), latents.unsqueeze(0), mask, self._scale)
            return torch.bmm(mixed.view(heads, s, self._latent), self._value_up).transpose(0, 1)
        up = gemm.linear(latents, self._attention.linear_kv_up_proj.weight, self._kernel).view(
            len(keys), heads, self._nope + self._value
        )
        expanded = torch.cat([up[..., : self._nope], rotary_keys.unsqueeze(1).expand(-1, heads, -1)], dim=-1)
        return _prefill(self._attention, torch.cat([nope, rotary], dim=-1), expanded, up[..., self._nope :])


class GroupedAttention:
    """Grouped-query attention: hidden [t / tp, h] -> the same shape.

    Args:
        attention: Megatron-Core's module.
        number: of the layer in the cache.
        rotary: Megatron-Core's rotary embedding of the model.
        rotary_scale: factor on cosine and sine.
    """

    def __init__(self, attention: Any, number: int, rotary: Any, rotary_scale: float) -> None:
        self._attention, self._rotary, self._rotary_scale = attention, rotary, rotary_scale
        self._layer_number = number
        self._scale: float = attention.core_attention.scale
        self._interleaved: bool = attention.config.rotary_interleaved
        self._output = PreparedLinear(attention.linear_proj)

    def __call__(self, hidden: Tensor, context: CacheContext) -> Tensor:
        queries, keys, values = self._attention.get_query_key_value_tensors(hidden.unsqueeze(1), None)
        rotary = context.rotary(self._rotary, self._rotary_scale, self._interleaved)
        queries, keys, values = rotated(queries.squeeze(1), rotary), rotated(keys.squeeze(1), rotary), values.squeeze(1)
        count, store = context.num_tokens, context.layer(self._layer_number)
        store.write(context.slots, key=keys[:count], value=values[:count])
        outputs = []
        for part in context.parts:
            rows = part.rows
            if isinstance(part, Decoding):
                outputs.append(self._decode(queries[rows], store, part))
                continue
            own = (keys[rows], values[rows])
            if not (store.is_exact and part.starts_sequence):
                own = (store.read("key", part.slots), store.read("value", part.slots))
            outputs.append(_prefill(self._attention, queries[rows], *own))
        return self._output(_joined(outputs, queries, queries.size(-1)))

    def _decode(self, queries: Tensor, store: LayerStore, part: Decoding) -> Tensor:
        """`s` tokens of each sequence: [n * s, heads, d] -> [n * s, heads, dv]."""
        (t, heads, d), s = queries.shape, part.queries
        if part.gathered is None:
            alone = zip(queries.split(s), part.pieces, strict=True)
            return torch.cat([self._attend(own, store, pieces) for own, pieces in alone])
        keys, values = (store.read(name, part.gathered.slots) for name in ("key", "value"))
        n, groups, group = t // s, keys.size(2), heads // keys.size(2)
        q = queries.view(n, s, groups, group, d).transpose(1, 2).reshape(n * groups, s * group, d)
        k, v = (x.transpose(1, 2).flatten(0, 1) for x in (keys, values))
        out = _mix(q, k, v, part.gathered.mask_of(group, groups), self._scale).view(n, groups, s, group, -1)
        return out.transpose(1, 2).reshape(t, heads, -1)

    def _attend(self, queries: Tensor, store: LayerStore, pieces: Pieces) -> Tensor:
        """Attention of the last tokens of a sequence: [s, heads, d] -> [s, heads, dv]."""
        s, heads, d = queries.shape
        keys, values = ([store.read(name, own).transpose(0, 1) for own in pieces.slots] for name in ("key", "value"))
        groups = keys[0].size(0)
        q = queries.transpose(0, 1).reshape(groups, -1, d)  # [groups, heads / groups * s, d]
        scores = _joined_scores([torch.bmm(q, own.mT) for own in keys]).mul_(self._scale)
        weights = pieces.mask(scores.flatten(0, 1)).view(scores.shape).softmax(dim=-1)
        first, *others = weights.split([own.size(1) for own in keys], dim=-1)
        out = torch.bmm(first, values[0])
        if others:
            out = out.baddbmm_(others[0], values[1])
        return out.view(heads, s, -1).transpose(0, 1)


def rotated(x: Tensor, rotary: Rotary) -> Tensor:
    """The first dimensions of `x` [t, heads, d], as many as there are angles, rotated; the others unchanged.

    Pairs that are neighbours stay so, where upstream's `_apply_rotary_pos_emb_bshd` (models/common/embeddings/
    rope_utils.py) moves them apart: attention scores are the same.
    """
    width = rotary.cosine.size(-1)
    turned = x if width == x.size(-1) else x[..., :width]
    if rotary.interleaved:
        other = turned.unflatten(-1, (width // 2, 2)).flip(-1).flatten(-2)
    else:
        other = turned.roll(width // 2, -1)
    turned = (turned * rotary.cosine).add_(other * rotary.sine)
    return turned if width == x.size(-1) else torch.cat([turned, x[..., width:]], dim=-1)


def _joined(parts: list[Tensor], like: Tensor, width: int) -> Tensor:
    """Outputs [n, heads, width] of all sequences, and zeros for tokens that pad the batch: [t, heads * width]."""
    missing = like.size(0) - sum(part.size(0) for part in parts)
    if missing:
        parts = [*parts, like.new_zeros(missing, like.size(1), width)]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).flatten(1)


def _joined_scores(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _mix(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
    """softmax(queries keys^T * scale + mask) values: [b, m, c], [b, k, c], [b, k, d] -> [b, m, d]."""
    scores = torch.baddbmm(mask, queries, keys.mT, alpha=scale)
    return torch.bmm(scores.softmax(dim=-1), values)


def _causal_mask(queries: int, keys: int, like: Tensor) -> Tensor:
    """Added to the scores of the last `queries` of `keys` tokens: [1, queries, keys]."""
    mask = torch.full((queries, keys), -torch.inf, dtype=like.dtype, device=like.device)
    return mask.triu_(keys - queries + 1).unsqueeze(0)


def _prefill(attention: Any, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Causal attention of the last tokens of a sequence: [s, n, d], [k, g, d], [k, g, dv] -> [s, n, dv]."""
    out: Tensor = attention.core_attention.last_queries(*(x.unsqueeze(1) for x in (queries, keys, values)))
    return out.view(*queries.shape[:2], values.size(-1))
