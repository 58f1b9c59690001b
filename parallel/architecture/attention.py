"""The kinds of attention: one row each, which everything else reads. No torch import.

A further kind is a row of `ATTENTIONS`, with a function that describes its linear layers and norms. Code that differs
by more than a property has a table of its own with a row for each kind, which `row_of` reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from parallel.architecture.parts import Linear, Model, Norm, Shard, Width, hidden_width

Row = TypeVar("Row")


@dataclass(frozen=True)
class AttentionCore:
    """softmax(queries keys) values.

    Args:
        heads, kv_heads: query heads, and heads of keys and values.
        key, value: sizes of one query or key head, and of one value head.
        latent: width of the latent and the rotary keys, from which keys and values are computed; 0 where there is none.
    """

    heads: int
    kv_heads: int
    key: int
    value: int
    latent: int = 0

    def heads_on_rank(self, ranks: int) -> float:
        """Query heads on one of `ranks` tensor-parallel ranks."""
        return self.heads / ranks

    def kv_heads_on_rank(self, ranks: int) -> float:
        """Key/value heads on one of them: at least one."""
        return max(1.0, self.kv_heads / ranks)


@dataclass(frozen=True)
class Attention:
    """The attention of a layer.

    Args:
        norm: of its input.
        projections: linear layers before core attention, in the order in which they run.
        norms: of queries and keys, or of their latents.
        gathered: widths of the tensors that sequence parallelism gathers in front of it, for each token.
    """

    kind: AttentionKind
    norm: Norm
    projections: tuple[Linear, ...]
    norms: tuple[Norm, ...]
    gathered: tuple[int, ...]
    core: AttentionCore
    output: Linear

    @property
    def linears(self) -> tuple[Linear, ...]:
        """All its linear layers."""
        return (*self.projections, self.output)


@dataclass(frozen=True)
class AttentionKind:
    """Properties of one kind of attention.

    Args:
        name: value of `model.attention`.
        describe: its layers, for a model.
        fields: fields of the model that only it reads, in addition to `num_attention_heads`.
        latent: keys and values come from a compressed latent, as many heads of them as of queries. The norm of the
            latent has an epsilon of its own, and YaRN scales the softmax (transformer/multi_latent_attention.py
            upstream).
        norm_in_linear: Transformer Engine fuses the norm of the input into the first projection, so that it can
            neither be recomputed nor offloaded by itself.
        fused_rope: Megatron-Core fuses its rotary embedding. For multi-head latent attention it calls that
            experimental.
        shared_rope: the model computes one tensor of rotary angles for all layers (models/gpt/gpt_model.py upstream);
            else each attention computes its own.
        recompute_modules: values of `recompute.modules` that only it has.
    """

    name: str
    describe: Callable[[Model], Attention]
    fields: tuple[str, ...]
    latent: bool
    norm_in_linear: bool
    fused_rope: bool
    shared_rope: bool
    recompute_modules: tuple[str, ...] = ()


def modules_of_other_attentions(model: Model) -> set[str]:
    """Values of `recompute.modules` that only attentions of another kind have."""
    own = attention_kind(model)
    return {module for kind in ATTENTIONS.values() if kind is not own for module in kind.recompute_modules}


def attention_kind(model: Model) -> AttentionKind:
    """The row of the model's attention."""
    return ATTENTIONS[model.attention]


def row_of(kind: AttentionKind, table: Mapping[str, Row], place: str) -> Row:
    """The row that another table has for a kind of attention.

    Args:
        place: name of the table and its file, for the error.

    Raises:
        NotImplementedError: the table has none. It does not take the row of another kind.
    """
    if kind.name not in table:
        raise NotImplementedError(f"model.attention={kind.name} has no row in {place}")
    return table[kind.name]


def _latent_attention(model: Model) -> Attention:
    """Multi-head latent attention (arXiv 2405.04434, section 2.1 and appendix C)."""
    heads, hidden, latent, rank = model.num_attention_heads, model.hidden_size, model.kv_lora_rank, model.q_lora_rank
    nope, rope, value = model.qk_nope_head_dim, model.qk_rope_head_dim, model.v_head_dim
    name, source = "self_attention.linear_", "input norm output"
    queries = Width("qk_nope_head_dim", (nope, rope), heads)
    keys_and_values = Width("qk_nope_head_dim", (nope, value), heads)
    meaning = f"model.kv_lora_rank + qk_rope_head_dim = {latent} + {rope}"
    query_latent, kv_latent = Width("q_lora_rank", (rank,)), Width("kv_lora_rank", (latent,))
    norms: tuple[Norm, ...] = (
        Norm(f"{name}kv_up_proj.layer_norm_weight", latent, "self_attention.kv_layernorm.weight"),
    )
    up = ("mla_up_proj",)
    if rank:
        of_queries: tuple[Linear, ...] = (
            Linear("attention", f"{name}q_down_proj.weight", query_latent, hidden_width(model), Shard.LATENT, source),
            Linear("attention", f"{name}q_up_proj.weight", queries, query_latent, Shard.COLUMN, "query norm output",
                   recomputed_by=up),
        )  # fmt: skip
        norms = (Norm(f"{name}q_up_proj.layer_norm_weight", rank, "self_attention.q_layernorm.weight"), *norms)
    else:
        of_queries = (Linear("attention", f"{name}q_proj.weight", queries, hidden_width(model), Shard.COLUMN, source),)
    of_keys = (
        Linear("attention", f"{name}kv_down_proj.weight", Width("qk_rope_head_dim", (latent, rope), meaning=meaning),
               hidden_width(model), Shard.LATENT, source),
        Linear("attention", f"{name}kv_up_proj.weight", keys_and_values, kv_latent, Shard.COLUMN,
               "key/value norm output", recomputed_by=up),
    )  # fmt: skip
    return Attention(
        ATTENTIONS[model.attention],
        Norm("input_layernorm.weight", hidden),
        (*of_queries, *of_keys),
        norms,
        tuple(width for width in (rank, latent, rope) if width),
        AttentionCore(heads, heads, nope + rope, value, latent + rope),
        Linear("attention", f"{name}proj.weight", hidden_width(model), Width("v_head_dim", (value,), heads), Shard.ROW,
               "attention output"),
    )  # fmt: skip


def _grouped_attention(model: Model) -> Attention:
    """Grouped-query attention."""
    heads, groups, size, hidden = model.num_attention_heads, model.kv_heads, model.attention_head_dim, model.hidden_size
    name = "self_attention."
    bias = f"{name}linear_qkv.bias" if model.qkv_bias else ""
    norms: tuple[Norm, ...] = ()
    if model.qk_norm != "none":
        all_heads = model.qk_norm == "full"
        norms = (
            Norm(f"{name}q_layernorm.weight", heads * size if all_heads else size),
            Norm(f"{name}k_layernorm.weight", groups * size if all_heads else size),
        )
    return Attention(
        ATTENTIONS[model.attention],
        Norm(f"{name}linear_qkv.layer_norm_weight", hidden, "input_layernorm.weight"),
        (
            Linear("attention", f"{name}linear_qkv.weight", Width("head_dim", (size,), heads, groups),
                   hidden_width(model), Shard.COLUMN, "input norm output", bias=bias),
        ),
        norms,
        (hidden,),
        AttentionCore(heads, groups, size, size),
        Linear("attention", f"{name}linear_proj.weight", hidden_width(model), Width("head_dim", (size,), heads),
               Shard.ROW, "attention output"),
    )  # fmt: skip


_ROWS = (
    AttentionKind(
        name="mla", describe=_latent_attention, latent=True, norm_in_linear=False, fused_rope=False, shared_rope=False,
        fields=("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
        recompute_modules=("mla_up_proj",),
    ),
    AttentionKind(
        name="gqa", describe=_grouped_attention, latent=False, norm_in_linear=True, fused_rope=True, shared_rope=True,
        fields=("num_query_groups", "head_dim"),
    ),
)  # fmt: skip
ATTENTIONS = {row.name: row for row in _ROWS}
