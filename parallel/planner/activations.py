"""Activation memory of a layer: what it saves for its backward pass, in bytes. No torch import.

The functions here combine attention (`parallel.planner.attention_costs`), norms, linear layers and SwiGLU
(`parallel.planner.saved_tensors`) with the router, and leave out what selective recomputation discards.
"""

from __future__ import annotations

from parallel.architecture.layers import GatedMLP, MixtureOfExperts
from parallel.planner.attention_costs import costs_of
from parallel.planner.saved_tensors import BACKENDS, FP32, INDEX, Saved, layer_norm, linear_inputs, norm, swiglu
from parallel.planner.workload import Workload

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


def layer(workload: Workload, moe: bool, recompute: bool = True) -> Saved:
    """One transformer layer; with `recompute` without what selective recomputation discards."""
    modules = workload.recompute_modules if recompute and workload.recompute == "selective" else frozenset()
    described = workload.description(moe)
    kept = costs_of(described.attention.kind).saved(workload, described.attention, modules)
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


def _dense(workload: Workload, block: GatedMLP, modules: frozenset[str]) -> Saved:
    """Dense feed-forward (transformer/mlp.py upstream)."""
    model, r = workload.model, workload.split_tokens
    fused_norm = BACKENDS[workload.backend].norm_in_linear
    if fused_norm and "mlp" in modules:
        return {"middle": workload.element * r * model.hidden_size}
    if fused_norm:
        kept, output_kept = norm(workload, "feed-forward norm", r, model.hidden_size, "middle"), True
    else:
        kept, output_kept = layer_norm(workload, "feed-forward norm", "middle", modules)
    if "mlp" in modules:
        return kept | ({"feed-forward input": workload.element * r * model.hidden_size} if output_kept else {})
    if output_kept:
        kept |= linear_inputs(workload, [block.up])
    return kept | swiglu(workload, "feed-forward", block.down, fused=workload.fused)


def _moe(workload: Workload, experts: MixtureOfExperts, modules: frozenset[str]) -> Saved:
    """Router, dispatch, routed and shared experts (transformer/moe upstream)."""
    model, r = workload.model, workload.split_tokens
    kept, output_kept = layer_norm(workload, "feed-forward norm", "middle", modules)
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
