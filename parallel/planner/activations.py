"""What each module keeps for its backward pass, in bytes. No torch import.

Everything is a dictionary from the name of a stored tensor to its bytes: two modules that keep the same tensor use the
same name, and it counts once. `BACKENDS` is the table of what differs between the two implementations of the model;
the functions below put a layer together from it, and leave out what recomputation throws away.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from parallel.architecture.attention import Attention
from parallel.architecture.layers import GatedMLP, MixtureOfExperts
from parallel.architecture.parts import Linear, Shard
from parallel.fp8_recipes import RECIPES
from parallel.planner.workload import Workload, short_attention_scores

Saved = dict[str, float]
INDEX = 8  # bytes of an int64 index
FP32 = 4
EXPERT_TENSORS = "routed "  # in the name of each tensor that grows with the tokens of a rank's experts
# Inputs of the modules that Megatron-Core can move to the host. The output of core attention is the projection's input.
OFFLOADED = {
    "attn_norm": ("input",),
    "qkv_linear": ("input norm output",),
    "core_attn": ("queries", "keys", "values"),
    "attn_proj": ("attention output",),
    "mlp_norm": ("middle",),
    "expert_fc1": ("routed expert input",),
    "moe_act": ("routed experts: gate and up",),
}
# DeepSeek-V3's formats of what waits for the backward pass: an element with its share of the scale of a 1x128 tile.
E5M6_BYTES = 12 / 8 + 4 / 128
E4M3_BYTES = 1 + 4 / 128


@dataclass(frozen=True)
class Backend:
    """What one implementation keeps.

    Args:
        norm_keeps_fp32: an RMSNorm keeps its input and the normalised input in fp32; else its input unchanged.
        norm_in_linear: norms before gqa's qkv, dense feed-forward and mla's up-projections are part of that linear
            layer, so that `layernorm` cannot recompute them and `mla_up_proj` recomputes mla's with it.
        pads_values: attention wants keys and values of one size.
        expands_keys: attention wants as many key/value heads as query heads.
        gathers_sequence: context parallelism gathers all keys and values; else they go around in a ring.
        separate_rope: rotary embedding keeps its cosines and sines.
    """

    norm_keeps_fp32: bool
    norm_in_linear: bool
    pads_values: bool
    expands_keys: bool
    gathers_sequence: bool
    separate_rope: bool


BACKENDS = {
    "local": Backend(
        norm_keeps_fp32=True, norm_in_linear=False, pads_values=True, expands_keys=True, gathers_sequence=True,
        separate_rope=True,
    ),
    "te": Backend(
        norm_keeps_fp32=False, norm_in_linear=True, pads_values=False, expands_keys=False, gathers_sequence=False,
        separate_rope=False,
    ),
}  # fmt: skip


def linear_input(workload: Workload, name: str, tokens: float, width: float, copies: int = 1) -> Saved:
    """Input of a linear layer: unchanged (shared with other modules that keep it), or one FP8 copy for each layer."""
    if workload.fp8 is None:
        return {name: workload.element * tokens * width}
    return {f"{name} in fp8": copies * RECIPES[workload.fp8].element_bytes * tokens * width}


def linear_inputs(workload: Workload, linears: Iterable[Linear]) -> Saved:
    """Inputs that linear layers keep. Layers that read one tensor share it, but for a copy of each in FP8."""
    readers: dict[str, list[Linear]] = {}
    for linear in linears:
        readers.setdefault(linear.source, []).append(linear)
    kept: Saved = {}
    for source, its in readers.items():
        first = its[0]
        width = first.inputs_on_rank(getattr(workload.layout, first.degree))
        kept |= linear_input(workload, source, _tokens(workload, first), width, copies=len(its))
    return kept


def _tokens(workload: Workload, linear: Linear) -> float:
    """Tokens of the input that a linear layer keeps: with sequence parallelism those of this rank, unless all tokens
    were gathered before, for the layer that splits its columns."""
    if linear.experts:
        return workload.expert_tokens
    return workload.tokens if linear.shard is Shard.ROW else workload.split_tokens


def norm(workload: Workload, name: str, tokens: float, width: float, source: str, source_width: float = 0) -> Saved:
    """RMSNorm over `width`. `source` names its input, which may be a part of a tensor that is `source_width` wide."""
    input_bytes = workload.element * tokens * (source_width or width)
    root = {f"{name}: 1 / root": FP32 * tokens}
    if not _norm_keeps_fp32(workload):
        return {source: input_bytes, **root}
    normalised = {f"{name}: normalised": FP32 * tokens * width}
    if workload.dtype == "fp32":
        return {source: input_bytes, **normalised, **root}
    return {f"{name}: input in fp32": FP32 * tokens * width, **normalised, **root}


def _norm_keeps_fp32(workload: Workload) -> bool:
    """In fp32 on a CPU the local backend has a norm of its own (moe_train.model.local.norm.NormOnCPU)."""
    return BACKENDS[workload.backend].norm_keeps_fp32 and not (workload.on_cpu and workload.dtype == "fp32")


def _own_swiglu(workload: Workload) -> bool:
    """Whether the activation keeps gate and up alone (moe_train.model.local.swiglu)."""
    return workload.on_cpu and workload.backend == "local"


def swiglu(
    workload: Workload, name: str, down: Linear, *, fused: bool, weighted: bool = False, recomputed: bool = False
) -> Saved:
    """Gate and up, what the unfused function keeps between them, router weights, and the input of the layer `down`."""
    e, tokens = workload.element, _tokens(workload, down)
    inner = down.inputs_on_rank(getattr(workload.layout, down.degree))
    kept = {f"{name}: gate and up": e * tokens * 2 * inner}
    if weighted:
        kept[f"{name}: router weights"] = FP32 * tokens
    if recomputed:
        return kept
    if not fused and not _own_swiglu(workload):
        kept |= {f"{name}: silu": e * tokens * inner, f"{name}: up": e * tokens * inner}
    if not fused and weighted:
        kept[f"{name}: silu x up"] = e * tokens * inner
    return kept | linear_inputs(workload, [down])


def layer(workload: Workload, moe: bool, recompute: bool = True) -> Saved:
    """One transformer layer; with `recompute` without what selective recomputation throws away."""
    modules = workload.recompute_modules if recompute and workload.recompute == "selective" else frozenset()
    described = workload.description(moe)
    attend = _latent_attention if described.attention.kind.latent else _grouped_attention
    kept = attend(workload, described.attention, modules)
    if described.dense:
        kept |= _dense(workload, described.dense, modules)
    if described.experts:
        kept |= _moe(workload, described.experts, modules)
    if workload.compact:
        kept = compacted(workload, kept)
    # The norm before a dense feed-forward is part of its first linear layer, and its input stays.
    movable = [module for module in workload.offload_modules if moe or module != "mlp_norm"]
    outside = {name for module in movable for name in OFFLOADED[module]}
    return {name: size for name, size in kept.items() if name.removesuffix(" in fp8") not in outside}


def resident(workload: Workload, kept: Saved) -> Saved:
    """What stays in memory until the backward pass when large tensors are offloaded (model/local/offload.py)."""
    return {name: size for name, size in kept.items() if size < workload.offload_min_bytes}


def _layer_norm(workload: Workload, name: str, source: str, modules: frozenset[str]) -> tuple[Saved, bool]:
    """A norm of the hidden state that is not fused, and whether its output is saved for the layers that read it."""
    width = workload.model.hidden_size
    if "layernorm" in modules:
        return {source: workload.element * workload.split_tokens * width}, False
    return norm(workload, name, workload.split_tokens, width, source), True


def _latent_attention(workload: Workload, attention: Attention, modules: frozenset[str]) -> Saved:
    """Multi-head latent attention (transformer/multi_latent_attention.py upstream)."""
    backend, e, core = BACKENDS[workload.backend], workload.element, attention.core
    n, r, rope = workload.tokens, workload.split_tokens, workload.model.qk_rope_head_dim
    kept, output_kept = _layer_norm(workload, "input norm", "input", modules)
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


def _rotary(size: float) -> Saved:
    """What rotary embedding of queries and of keys keeps, of `size` bytes each."""
    return {f"rotary {function} of {what}": size for function in ("cosine", "sine") for what in ("queries", "keys")}


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


def _grouped_attention(workload: Workload, attention: Attention, modules: frozenset[str]) -> Saved:
    """Grouped-query attention (transformer/attention.py upstream)."""
    model, backend, e = workload.model, BACKENDS[workload.backend], workload.element
    n, r, size, tp = workload.tokens, workload.split_tokens, attention.core.key, workload.layout.tp
    heads, groups = attention.core.heads_on_rank(tp), attention.core.kv_heads_on_rank(tp)
    if backend.norm_in_linear:
        kept, output_kept = norm(workload, "input norm", r, model.hidden_size, "input"), True
    else:
        kept, output_kept = _layer_norm(workload, "input norm", "input", modules)
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
    copies = (
        1 if workload.dtype == "fp32" else 2
    )  # of fp32 size: the normalised tensor, and the input where it is 16-bit
    for name, wide in width.items():
        if model.qk_norm == "full":  # moe_train.model.local.norm.AllHeadsRMSNorm, on both backends
            kept[f"{name} norm"] = FP32 * n + (FP32 * copies + (e if copies == 2 else 0)) * n * wide
        else:
            kept[f"{name} norm"] = FP32 * n * wide / size
            tables = copies if _norm_keeps_fp32(workload) else 0
            kept |= {f"{name} norm {table}": FP32 * n * wide for table in range(tables)}
    return kept


def _dense(workload: Workload, block: GatedMLP, modules: frozenset[str]) -> Saved:
    """Dense feed-forward (transformer/mlp.py upstream)."""
    model, r = workload.model, workload.split_tokens
    fused_norm = BACKENDS[workload.backend].norm_in_linear
    if fused_norm and "mlp" in modules:
        return {"middle": workload.element * r * model.hidden_size}
    if fused_norm:
        kept, output_kept = norm(workload, "feed-forward norm", r, model.hidden_size, "middle"), True
    else:
        kept, output_kept = _layer_norm(workload, "feed-forward norm", "middle", modules)
    if "mlp" in modules:
        return kept | ({"feed-forward input": workload.element * r * model.hidden_size} if output_kept else {})
    if output_kept:
        kept |= linear_inputs(workload, [block.up])
    return kept | swiglu(workload, "feed-forward", block.down, fused=workload.fused)


def _moe(workload: Workload, experts: MixtureOfExperts, modules: frozenset[str]) -> Saved:
    """Router, dispatch, routed and shared experts (transformer/moe upstream)."""
    model, r = workload.model, workload.split_tokens
    kept, output_kept = _layer_norm(workload, "feed-forward norm", "middle", modules)
    if output_kept:
        kept["feed-forward input"] = workload.element * r * model.hidden_size  # the router reads it, or the checkpoint
    if "moe" in modules:
        return kept
    kept |= _router(workload)
    kept |= linear_inputs(workload, [experts.routed.up])
    kept |= swiglu(
        workload, "routed experts", experts.routed.down,
        fused=workload.fused or workload.grouped, weighted=True, recomputed="moe_act" in modules,
    )  # fmt: skip
    if experts.shared and "shared_experts" not in modules:
        if output_kept:
            kept |= linear_inputs(workload, [experts.shared.up])
        kept |= swiglu(workload, "shared experts", experts.shared.down, fused=workload.fused)
        if experts.shared_gate:
            width = model.hidden_size
            kept |= {
                "shared experts: gate": workload.element * r,
                "shared experts: output": workload.element * r * width,
            }
    return kept


def _router(workload: Workload) -> Saved:
    """Scores, choices and the maps that send tokens to experts and back (transformer/moe/moe_utils.py upstream)."""
    model, r = workload.model, workload.split_tokens
    experts, topk = model.num_experts, model.topk
    scores = FP32 * experts
    kept: Saved = {"chosen experts": INDEX * topk, "token map": experts, "token weights": scores,
                   "token order": INDEX * topk}  # fmt: skip
    if model.router_score == "sigmoid":
        kept |= {"scores": scores, "chosen scores": FP32 * topk, "sum of scores": FP32}
    else:
        kept["scores"] = scores if model.router_pre_softmax else FP32 * topk
    if model.router_num_groups:
        kept |= _expert_groups(workload)
    if model.balance_losses:
        kept |= {"balance loss: scores": scores, "balance loss: chosen experts": INDEX * topk}
        kept |= {"balance loss: sum of scores": FP32} if model.router_score == "sigmoid" else {}
    return {f"router: {name}": r * size for name, size in kept.items()}


def _expert_groups(workload: Workload) -> Saved:
    """Choice of groups of experts, bytes a token (upstream's `group_limited_topk`, parallel.runtime.expert_groups)."""
    model = workload.model
    groups, chosen = model.router_num_groups, model.router_topk_groups
    if model.router_group_score == "sum":
        best = INDEX * groups * (model.topk // chosen)
        return {"best of groups": best, "chosen groups": INDEX * chosen, "map of groups": model.num_experts}
    kept: Saved = {"best of groups": FP32 * groups, "ties of groups": groups, "chosen groups": INDEX * chosen}
    if model.router_bias or (model.router_score == "softmax" and not model.router_pre_softmax):
        kept["scores of groups"] = FP32 * model.num_experts  # else they are the scores that are kept anyway
    return kept


def compacted(workload: Workload, kept: dict[str, float]) -> dict[str, float]:
    """The tensors that a layer keeps, by name and bytes, as DeepSeek-V3's own software keeps them.

    With the same recomputation it keeps less than Transformer Engine (arXiv 2412.19437, sections 3.2.3 and 3.3.3):
    SwiGLU's inputs are kept in FP8 and its output is recomputed; the output of attention is kept once, in 12 bits, for
    attention and for its output projection.
    """
    unique = {}
    for name, size in kept.items():
        if name.endswith("down input in fp8") or name == "attention output in fp8":
            continue
        if name.endswith("gate and up"):
            size *= E4M3_BYTES / workload.element
        elif name == "attention output":
            size *= E5M6_BYTES / workload.element
        unique[name] = size
    return unique


def shared_embedding_bytes(workload: Workload) -> float:
    """Weights and gradients of the embedding's copy for multi-token prediction, which DeepSeek-V3 shares with the main
    model: on the rank of DualPipe that holds the first stage and the last."""
    if not workload.compact or not any("m" in items for items in workload.stages):
        return 0.0
    matrix = workload.model.padded_vocab_size * workload.model.hidden_size / workload.layout.tp
    return (workload.element + workload.grad_bytes) * matrix
