"""What each module keeps for its backward pass, in bytes. No torch import.

Everything is a dictionary from the name of a stored tensor to its bytes: two modules that keep the same tensor use the
same name, and it counts once. `BACKENDS` is the table of what differs between the two implementations of the model;
the functions below put a layer together from it, and leave out what recomputation throws away.
"""

from __future__ import annotations

from dataclasses import dataclass

from parallel.fp8_recipes import RECIPES
from parallel.planner.workload import Job, short_attention_scores

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
        norm_keeps_fp32: an RMSNorm keeps its input and the normalised input in fp32; else its input as it is.
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


def linear_input(job: Job, name: str, tokens: float, width: float, copies: int = 1) -> Saved:
    """Input of a linear layer: unchanged (shared with other modules that keep it), or one FP8 copy for each layer."""
    if job.fp8 is None:
        return {name: job.element * tokens * width}
    return {f"{name} in fp8": copies * RECIPES[job.fp8].element_bytes * tokens * width}


def norm(job: Job, name: str, tokens: float, width: float, source: str, source_width: float = 0) -> Saved:
    """RMSNorm over `width`. `source` names its input, which may be a part of a tensor that is `source_width` wide."""
    input_bytes = job.element * tokens * (source_width or width)
    root = {f"{name}: 1 / root": FP32 * tokens}
    if not _norm_keeps_fp32(job):
        return {source: input_bytes, **root}
    normalised = {f"{name}: normalised": FP32 * tokens * width}
    if job.dtype == "fp32":
        return {source: input_bytes, **normalised, **root}
    return {f"{name}: input in fp32": FP32 * tokens * width, **normalised, **root}


def _norm_keeps_fp32(job: Job) -> bool:
    """In fp32 on a CPU the local backend has a norm of its own (moe_train.model.local.norm.NormOnCPU)."""
    return BACKENDS[job.backend].norm_keeps_fp32 and not (job.on_cpu and job.dtype == "fp32")


def _own_swiglu(job: Job) -> bool:
    """Whether the activation keeps gate and up alone (moe_train.model.local.swiglu)."""
    return job.on_cpu and job.backend == "local"


def swiglu(
    job: Job, name: str, tokens: float, inner: float, *, fused: bool, weighted: bool = False, recomputed: bool = False
) -> Saved:
    """Gate and up, what the unfused function keeps between them, router weights, and the input of the last layer."""
    e = job.element
    kept = {f"{name}: gate and up": e * tokens * 2 * inner}
    if weighted:
        kept[f"{name}: router weights"] = FP32 * tokens
    if recomputed:
        return kept
    if not fused and not _own_swiglu(job):
        kept |= {f"{name}: silu": e * tokens * inner, f"{name}: up": e * tokens * inner}
    if not fused and weighted:
        kept[f"{name}: silu x up"] = e * tokens * inner
    return kept | linear_input(job, f"{name}: down input", tokens, inner)


def layer(job: Job, moe: bool, recompute: bool = True) -> Saved:
    """One transformer layer; with `recompute` without what the job's selective recomputation throws away."""
    modules = job.recompute_modules if recompute and job.recompute == "selective" else frozenset()
    attention = _mla(job, modules) if job.model.attention == "mla" else _gqa(job, modules)
    kept = attention | (_moe(job, modules) if moe else _dense(job, modules))
    if job.compact:
        kept = compacted(job, kept)
    # The norm before a dense feed-forward is part of its first linear layer, and its input stays.
    movable = [module for module in job.offload_modules if moe or module != "mlp_norm"]
    outside = {name for module in movable for name in OFFLOADED[module]}
    return {name: size for name, size in kept.items() if name.removesuffix(" in fp8") not in outside}


def resident(job: Job, kept: Saved) -> Saved:
    """What stays in memory until the backward pass when large tensors are offloaded (model/local/offload.py)."""
    return {name: size for name, size in kept.items() if size < job.offload_min_bytes}


def _layer_norm(job: Job, name: str, source: str, modules: frozenset[str]) -> tuple[Saved, bool]:
    """A norm of the whole hidden state that stands alone, and whether its output is kept for those who read it."""
    width = job.model.hidden_size
    if "layernorm" in modules:
        return {source: job.element * job.split_tokens * width}, False
    return norm(job, name, job.split_tokens, width, source), True


def _mla(job: Job, modules: frozenset[str]) -> Saved:
    """Multi-head latent attention (transformer/multi_latent_attention.py upstream)."""
    model, backend, e = job.model, BACKENDS[job.backend], job.element
    n, r, hidden = job.tokens, job.split_tokens, job.model.hidden_size
    rope, latent = model.qk_rope_head_dim, model.kv_lora_rank
    kept, output_kept = _layer_norm(job, "input norm", "input", modules)
    if output_kept:
        kept |= linear_input(job, "input norm output", r, hidden, copies=2)
    recomputed = "mla_up_proj" in modules
    fused_norms = backend.norm_in_linear and recomputed
    if fused_norms:
        kept |= {"query latent": e * r * model.q_lora_rank, "key/value latent": e * r * (latent + rope)}
    else:
        if model.q_lora_rank:
            kept |= norm(job, "query norm", r, model.q_lora_rank, "query latent")
            kept |= linear_input(job, "query norm output", r, model.q_lora_rank)
        kept |= norm(job, "key/value norm", r, latent, "key/value latent", latent + rope)
        kept |= linear_input(job, "key/value norm output", r, latent)
    sequence = job.seq_length // job.layout.cp
    if recomputed:
        kept["rotary angles"] = FP32 * sequence * rope
        gathered = job.sequence_parallel and job.layout.tp > 1
        name, size = ("rotary key", n * rope) if gathered else ("key/value latent", r * (latent + rope))
        kept[name] = e * size
    else:
        kept |= _rotary(e * sequence * rope)
    return kept | _mla_core(job, modules)


def _rotary(size: float) -> Saved:
    """What rotary embedding of queries and of keys keeps, of `size` bytes each."""
    return {f"rotary {function} of {what}": size for function in ("cosine", "sine") for what in ("queries", "keys")}


def _mla_core(job: Job, modules: frozenset[str]) -> Saved:
    """softmax(q k) v of multi-head latent attention and the output projection."""
    model, backend, e = job.model, BACKENDS[job.backend], job.element
    heads = model.num_attention_heads / job.layout.tp
    key, value = model.qk_nope_head_dim + model.qk_rope_head_dim, model.v_head_dim
    unit = e * job.tokens * heads
    padded = backend.pads_values and key > value
    projections = {} if "mla_up_proj" in modules else {"queries": unit * key, "keys": unit * key}
    if backend.gathers_sequence and job.layout.cp > 1 and "core_attn" not in modules:
        return _gathered(job, heads, key, value, "queries" in projections)
    output = linear_input(job, "attention output", job.tokens, heads * value)
    if "core_attn" in modules:
        values = {} if "mla_up_proj" in modules else {"values": unit * value}
        return projections | values | output
    if job.short_attention:
        projections |= {} if "mla_up_proj" in modules else {"values": unit * value}
        return projections | _probabilities(job, heads) | output
    if padded:
        projections |= {"padded values": unit * key, "padded attention output": unit * key}
    else:
        projections |= {} if "mla_up_proj" in modules else {"values": unit * value}
        projections["attention output"] = unit * value
    return projections | {"log-sum-exp": FP32 * job.tokens * heads} | output


def _probabilities(job: Job, heads: float) -> Saved:
    """What short attention keeps in addition to queries, keys and values (moe_train.model.local.attention)."""
    scores = short_attention_scores(job.seq_length, job.element)
    return {"attention probabilities": job.element * job.micro_batch_size * heads * scores}


def _gathered(job: Job, heads: float, key: float, value: float, queries: bool) -> Saved:
    """Core attention over keys and values gathered from all context-parallel ranks (moe_train.model.local.attention).

    A rank's two slices of the sequence see different parts of it, with a mask each. Padded values are copied for each.
    """
    cp, e = job.layout.cp, job.element
    part = job.seq_length // (2 * cp)
    unit, seen = e * heads * job.tokens, (2 * cp + 1) * part * job.micro_batch_size
    values = e * heads * (seen * key if key > value else job.tokens * cp * value)
    kept = {"gathered keys": unit * cp * key, "gathered values": values, "outputs of slices": unit * key}
    kept |= {"masks": e * (2 * cp + 1) * part * part, "log-sum-exp": FP32 * job.tokens * heads}
    kept |= {"queries": unit * key} if queries else {}
    return kept | linear_input(job, "attention output", job.tokens, heads * value)


def _gqa(job: Job, modules: frozenset[str]) -> Saved:
    """Grouped-query attention (transformer/attention.py upstream)."""
    model, backend, e = job.model, BACKENDS[job.backend], job.element
    n, r, size = job.tokens, job.split_tokens, job.model.attention_head_dim
    heads, groups = model.num_attention_heads / job.layout.tp, max(1.0, model.kv_heads / job.layout.tp)
    if backend.norm_in_linear:
        kept, output_kept = norm(job, "input norm", r, model.hidden_size, "input"), True
    else:
        kept, output_kept = _layer_norm(job, "input norm", "input", modules)
    if output_kept:
        kept |= linear_input(job, "input norm output", r, model.hidden_size)
    mixed = {"queries, keys and values": e * n * (heads + 2 * groups) * size}
    kept |= _qk_norms(job, heads, groups, mixed)
    if backend.separate_rope:
        kept |= _rotary(e * (job.seq_length // job.layout.cp) * model.rotary_dim)
    unit = e * n * size
    if backend.gathers_sequence and job.layout.cp > 1 and "core_attn" not in modules:
        return kept | _gathered(job, heads, size, size, queries=True)
    output = linear_input(job, "attention output", n, heads * size)
    expands = backend.expands_keys and heads > groups and "core_attn" not in modules
    if expands:
        kept |= {"queries": unit * heads, "expanded keys": unit * heads, "expanded values": unit * heads}
    else:
        kept |= {"queries": unit * heads, "keys": unit * groups}
        kept |= mixed if backend.expands_keys else {"values": unit * groups}  # values are a part of the mixed tensor
    if "core_attn" in modules:
        return kept | output
    if job.short_attention:
        return kept | _probabilities(job, heads) | output
    return kept | {"attention output": unit * heads, "log-sum-exp": FP32 * n * heads} | output


def _qk_norms(job: Job, heads: float, groups: float, mixed: Saved) -> Saved:
    """Norms of queries and keys. Queries are copied out of the mixed tensor where a group has several of them."""
    model, e, n, size = job.model, job.element, job.tokens, job.model.attention_head_dim
    if model.qk_norm == "none":
        return {}
    width = {"query": heads * size, "key": groups * size}
    sources = mixed if job.dtype == "fp32" or job.backend == "te" else {}
    if heads > groups and sources:
        sources = sources | {"queries before norm": e * n * width["query"]}
    kept: Saved = dict(sources)
    copies = 1 if job.dtype == "fp32" else 2  # of fp32 size: the normalised tensor, and the input where it is 16-bit
    for name, wide in width.items():
        if model.qk_norm == "full":  # moe_train.model.local.norm.AllHeadsRMSNorm, on both backends
            kept[f"{name} norm"] = FP32 * n + (FP32 * copies + (e if copies == 2 else 0)) * n * wide
        else:
            kept[f"{name} norm"] = FP32 * n * wide / size
            tables = copies if _norm_keeps_fp32(job) else 0
            kept |= {f"{name} norm {table}": FP32 * n * wide for table in range(tables)}
    return kept


def _dense(job: Job, modules: frozenset[str]) -> Saved:
    """Dense feed-forward (transformer/mlp.py upstream)."""
    model, r = job.model, job.split_tokens
    inner = model.ffn_hidden_size / job.layout.tp
    fused_norm = BACKENDS[job.backend].norm_in_linear
    if fused_norm and "mlp" in modules:
        return {"middle": job.element * r * model.hidden_size}
    if fused_norm:
        kept, output_kept = norm(job, "feed-forward norm", r, model.hidden_size, "middle"), True
    else:
        kept, output_kept = _layer_norm(job, "feed-forward norm", "middle", modules)
    if "mlp" in modules:
        return kept | ({"feed-forward input": job.element * r * model.hidden_size} if output_kept else {})
    if output_kept:
        kept |= linear_input(job, "feed-forward input", r, model.hidden_size)
    return kept | swiglu(job, "feed-forward", job.tokens, inner, fused=job.fused)


def _moe(job: Job, modules: frozenset[str]) -> Saved:
    """Router, dispatch, routed and shared experts (transformer/moe upstream)."""
    model, r = job.model, job.split_tokens
    kept, output_kept = _layer_norm(job, "feed-forward norm", "middle", modules)
    if output_kept:
        kept["feed-forward input"] = job.element * r * model.hidden_size  # the router reads it, or the checkpoint
    if "moe" in modules:
        return kept
    kept |= _router(job)
    visits, inner = job.expert_tokens, model.moe_ffn_hidden_size / job.layout.etp
    kept |= linear_input(job, "routed expert input", visits, model.hidden_size)
    kept |= swiglu(
        job, "routed experts", visits, inner,
        fused=job.fused or job.grouped, weighted=True, recomputed="moe_act" in modules,
    )  # fmt: skip
    if model.num_shared_experts and "shared_experts" not in modules:
        if output_kept:
            kept |= linear_input(job, "feed-forward input", r, model.hidden_size)
        shared = model.shared_expert_width / job.layout.tp
        kept |= swiglu(job, "shared experts", job.tokens, shared, fused=job.fused)
        if model.shared_expert_gate:
            width = model.hidden_size
            kept |= {"shared experts: gate": job.element * r, "shared experts: output": job.element * r * width}
    return kept


def _router(job: Job) -> Saved:
    """Scores, choices and the maps that send tokens to experts and back (transformer/moe/moe_utils.py upstream)."""
    model, r = job.model, job.split_tokens
    experts, topk = model.num_experts, model.topk
    scores = FP32 * experts
    kept: Saved = {"chosen experts": INDEX * topk, "token map": experts, "token weights": scores,
                   "token order": INDEX * topk}  # fmt: skip
    if model.router_score == "sigmoid":
        kept |= {"scores": scores, "chosen scores": FP32 * topk, "sum of scores": FP32}
    else:
        kept["scores"] = scores if model.router_pre_softmax else FP32 * topk
    if model.router_num_groups:
        kept |= _expert_groups(job)
    if model.balance_losses:
        kept |= {"balance loss: scores": scores, "balance loss: chosen experts": INDEX * topk}
        kept |= {"balance loss: sum of scores": FP32} if model.router_score == "sigmoid" else {}
    return {f"router: {name}": r * size for name, size in kept.items()}


def _expert_groups(job: Job) -> Saved:
    """Choice of groups of experts, bytes a token (upstream's `group_limited_topk`, parallel.runtime.expert_groups)."""
    model = job.model
    groups, chosen = model.router_num_groups, model.router_topk_groups
    if model.router_group_score == "sum":
        best = INDEX * groups * (model.topk // chosen)
        return {"best of groups": best, "chosen groups": INDEX * chosen, "map of groups": model.num_experts}
    kept: Saved = {"best of groups": FP32 * groups, "ties of groups": groups, "chosen groups": INDEX * chosen}
    if model.router_bias or (model.router_score == "softmax" and not model.router_pre_softmax):
        kept["scores of groups"] = FP32 * model.num_experts  # else they are the scores that are kept anyway
    return kept


def compacted(job: Job, kept: dict[str, float]) -> dict[str, float]:
    """The tensors that a layer keeps, by name and bytes, as DeepSeek-V3's own software keeps them.

    With the same recomputation it keeps less than Transformer Engine (arXiv 2412.19437, sections 3.2.3 and 3.3.3):
    SwiGLU's inputs are kept in FP8 and its output is recomputed; the output of attention is kept once, in 12 bits, for
    attention and for its output projection.
    """
    found = {}
    for name, size in kept.items():
        if name.endswith("down input in fp8") or name == "attention output in fp8":
            continue
        if name.endswith("gate and up"):
            size *= E4M3_BYTES / job.element
        elif name == "attention output":
            size *= E5M6_BYTES / job.element
        found[name] = size
    return found


def shared_embedding_bytes(job: Job) -> float:
    """Weights and gradients of the embedding's copy for multi-token prediction, which DeepSeek-V3 shares with the main
    model: on the rank of DualPipe that holds the first stage and the last."""
    if not job.compact or not any("m" in items for items in job.stages):
        return 0.0
    matrix = job.model.padded_vocab_size * job.model.hidden_size / job.layout.tp
    return (job.element + job.grad_bytes) * matrix
