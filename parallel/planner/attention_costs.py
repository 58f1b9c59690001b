"""Memory and time of each kind of attention that its linear layers do not say: one row each. No torch import.

Linear layers, their GEMMs and the FLOPs of core attention follow from the kind's description
(`parallel.architecture.attention`). The rows are here and not part of `ATTENTIONS`, because they read the `Workload`,
which imports the description: `parallel.architecture` imports nothing of the planner.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from parallel.architecture.attention import Attention, AttentionKind, row_of
from parallel.planner.saved_tensors import (
    BACKENDS,
    FP32,
    Saved,
    layer_norm,
    linear_inputs,
    norm,
    norm_keeps_fp32,
)
from parallel.planner.workload import Workload, short_attention_scores


@dataclass(frozen=True)
class Elementwise:
    """Memory-bound kernels between the linear layers of attention: norms, rotary embedding, copies.

    Args:
        forward, backward: bytes that they read and write in each pass, on one rank for one micro-batch.
        kernels: how many the host starts in each pass.
        recomputed_by: values of `recompute.modules` with which the backward pass runs the forward kernels again.
    """

    forward: float
    backward: float
    kernels: int
    recomputed_by: tuple[str, ...] = ()


@dataclass(frozen=True)
class AttentionCosts:
    """Costs of one kind of attention, on one rank for one micro-batch.

    Args:
        saved: tensors from the norm of the input to the input of the output projection that are saved for the backward
            pass, with these modules recomputed. `recompute.offload_modules` and `Workload.compact` find tensors by
            name: "input", "input norm output", "queries", "keys", "values", "attention output".
        elementwise: kernels that are neither GEMMs nor core attention, without the norm of the input.
    """

    saved: Callable[[Workload, Attention, frozenset[str]], Saved]
    elementwise: Callable[[Workload, Attention], tuple[Elementwise, ...]]


def costs_of(kind: AttentionKind) -> AttentionCosts:
    """The row of a kind of attention.

    Raises:
        NotImplementedError: it has none.
    """
    return row_of(kind, ATTENTION_COSTS, "ATTENTION_COSTS of parallel/planner/attention_costs.py")


def _latent_saved(workload: Workload, attention: Attention, modules: frozenset[str]) -> Saved:
    """Multi-head latent attention (transformer/multi_latent_attention.py upstream)."""
    backend, e, core = BACKENDS[workload.backend], workload.element, attention.core
    n, r, rope = workload.tokens, workload.split_tokens, workload.model.qk_rope_head_dim
    kept, output_kept = layer_norm(workload, "input norm", "input", modules)
    up = [linear for linear in attention.projections if "mla_up_proj" in linear.recomputed_by]
    if output_kept:
        kept |= linear_inputs(workload, [linear for linear in attention.projections if linear not in up])
    recomputed = "mla_up_proj" in modules
    fused_norms = backend.norm_in_linear and recomputed
    for linear in up:
        name, width = linear.source.removesuffix(" norm output"), linear.inputs.size
        # The norm of keys and values reads a part of a tensor that holds the rotary keys too.
        latent_width = core.latent if name == "key/value" else width
        if fused_norms:
            kept[f"{name} latent"] = e * r * latent_width
        else:
            kept |= norm(workload, f"{name} norm", r, width, f"{name} latent", latent_width)
            kept |= linear_inputs(workload, [linear])
    sequence = workload.seq_length // workload.layout.cp
    if recomputed:
        kept["rotary angles"] = FP32 * sequence * rope
        gathered = workload.sequence_parallel and workload.layout.tp > 1
        name, size = ("rotary key", n * rope) if gathered else ("key/value latent", r * core.latent)
        kept[name] = e * size
    else:
        kept |= _rotary(e * sequence * rope)
    return kept | _latent_core(workload, attention, modules)


def _latent_core(workload: Workload, attention: Attention, modules: frozenset[str]) -> Saved:
    """softmax(q k) v of multi-head latent attention and the output projection."""
    backend, e = BACKENDS[workload.backend], workload.element
    heads, key, value = attention.core.heads_on_rank(workload.layout.tp), attention.core.key, attention.core.value
    unit = e * workload.tokens * heads
    padded = backend.pads_values and key > value
    projections = {} if "mla_up_proj" in modules else {"queries": unit * key, "keys": unit * key}
    if backend.gathers_sequence and workload.layout.cp > 1 and "core_attn" not in modules:
        return _gathered(workload, attention, "queries" in projections)
    output = linear_inputs(workload, [attention.output])
    if "core_attn" in modules:
        values = {} if "mla_up_proj" in modules else {"values": unit * value}
        return projections | values | output
    if workload.short_attention:
        projections |= {} if "mla_up_proj" in modules else {"values": unit * value}
        return projections | _probabilities(workload, heads) | output
    if padded:
        projections |= {"padded values": unit * key, "padded attention output": unit * key}
    else:
        projections |= {} if "mla_up_proj" in modules else {"values": unit * value}
        projections["attention output"] = unit * value
    return projections | {"log-sum-exp": FP32 * workload.tokens * heads} | output


def _latent_elementwise(workload: Workload, attention: Attention) -> tuple[Elementwise, ...]:
    """Norms of latents; rotary embedding, and concatenation of the keys."""
    core = attention.core
    latents = workload.element * workload.split_tokens * sum(norm.width for norm in attention.norms)
    queries = workload.element * workload.tokens * core.heads_on_rank(workload.layout.tp) * (2 * core.key)
    return (
        Elementwise(2 * latents, 3 * latents, kernels=2, recomputed_by=("layernorm", "mla_up_proj")),
        Elementwise(2 * queries, 2 * queries, kernels=3, recomputed_by=("mla_up_proj",)),
    )


def _grouped_saved(workload: Workload, attention: Attention, modules: frozenset[str]) -> Saved:
    """Grouped-query attention (transformer/attention.py upstream)."""
    model, backend, e = workload.model, BACKENDS[workload.backend], workload.element
    n, r, size, tp = workload.tokens, workload.split_tokens, attention.core.key, workload.layout.tp
    heads, groups = attention.core.heads_on_rank(tp), attention.core.kv_heads_on_rank(tp)
    if backend.norm_in_linear:
        kept, output_kept = norm(workload, "input norm", r, model.hidden_size, "input"), True
    else:
        kept, output_kept = layer_norm(workload, "input norm", "input", modules)
    if output_kept:
        kept |= linear_inputs(workload, attention.projections)
    mixed = {"queries, keys and values": e * n * (heads + 2 * groups) * size}
    kept |= _qk_norms(workload, heads, groups, mixed)
    if backend.separate_rope:
        kept |= _rotary(e * (workload.seq_length // workload.layout.cp) * model.rotary_dim)
    unit = e * n * size
    if backend.gathers_sequence and workload.layout.cp > 1 and "core_attn" not in modules:
        return kept | _gathered(workload, attention, queries=True)
    output = linear_inputs(workload, [attention.output])
    expands = backend.expands_keys and heads > groups and "core_attn" not in modules
    if expands:
        kept |= {"queries": unit * heads, "expanded keys": unit * heads, "expanded values": unit * heads}
    else:
        kept |= {"queries": unit * heads, "keys": unit * groups}
        kept |= mixed if backend.expands_keys else {"values": unit * groups}  # values are a part of the mixed tensor
    if "core_attn" in modules:
        return kept | output
    if workload.short_attention:
        return kept | _probabilities(workload, heads) | output
    return kept | {"attention output": unit * heads, "log-sum-exp": FP32 * n * heads} | output


def _qk_norms(workload: Workload, heads: float, groups: float, mixed: Saved) -> Saved:
    """Norms of queries and keys. Queries are copied out of the mixed tensor where a group has several of them."""
    model, e, n, size = workload.model, workload.element, workload.tokens, workload.model.attention_head_dim
    if model.qk_norm == "none":
        return {}
    width = {"query": heads * size, "key": groups * size}
    sources = mixed if workload.dtype == "fp32" or workload.backend == "te" else {}
    if heads > groups and sources:
        sources = sources | {"queries before norm": e * n * width["query"]}
    kept: Saved = dict(sources)
    # Copies in FP32: the normalised tensor, and the input where it is 16-bit.
    copies = 1 if workload.dtype == "fp32" else 2
    for name, wide in width.items():
        if model.qk_norm == "full":  # moe_train.model.local.norm.AllHeadsRMSNorm, on both backends
            kept[f"{name} norm"] = FP32 * n + (FP32 * copies + (e if copies == 2 else 0)) * n * wide
        else:
            kept[f"{name} norm"] = FP32 * n * wide / size
            tables = copies if norm_keeps_fp32(workload) else 0
            kept |= {f"{name} norm {table}": FP32 * n * wide for table in range(tables)}
    return kept


def _grouped_elementwise(workload: Workload, attention: Attention) -> tuple[Elementwise, ...]:
    """Rotary embedding and norms of queries and keys."""
    core, tp = attention.core, workload.layout.tp
    mixed = workload.element * workload.tokens * (core.heads_on_rank(tp) + core.kv_heads_on_rank(tp)) * core.key
    rotary = Elementwise(2 * mixed, 2 * mixed, kernels=1)
    if not attention.norms:
        return (rotary,)
    return (rotary, Elementwise(2 * mixed, 3 * mixed, kernels=2))


def _rotary(size: float) -> Saved:
    """What rotary embedding of queries and of keys keeps, of `size` bytes each."""
    return {f"rotary {function} of {what}": size for function in ("cosine", "sine") for what in ("queries", "keys")}


def _probabilities(workload: Workload, heads: float) -> Saved:
    """What short attention keeps in addition to queries, keys and values (moe_train.model.local.attention)."""
    scores = short_attention_scores(workload.seq_length, workload.element)
    return {"attention probabilities": workload.element * workload.micro_batch_size * heads * scores}


def _gathered(workload: Workload, attention: Attention, queries: bool) -> Saved:
    """Core attention over keys and values gathered from all context-parallel ranks (moe_train.model.local.attention).

    A rank's two slices of the sequence see different parts of it, with a mask each. Padded values are copied for each.
    """
    cp, e = workload.layout.cp, workload.element
    heads, key, value = attention.core.heads_on_rank(workload.layout.tp), attention.core.key, attention.core.value
    part = workload.seq_length // (2 * cp)
    unit, seen = e * heads * workload.tokens, (2 * cp + 1) * part * workload.micro_batch_size
    values = e * heads * (seen * key if key > value else workload.tokens * cp * value)
    kept = {"gathered keys": unit * cp * key, "gathered values": values, "outputs of slices": unit * key}
    kept |= {"masks": e * (2 * cp + 1) * part * part, "log-sum-exp": FP32 * workload.tokens * heads}
    kept |= {"queries": unit * key} if queries else {}
    return kept | linear_inputs(workload, [attention.output])


ATTENTION_COSTS = {
    "mla": AttentionCosts(saved=_latent_saved, elementwise=_latent_elementwise),
    "gqa": AttentionCosts(saved=_grouped_saved, elementwise=_grouped_elementwise),
}
