"""Names and shapes of a model's tensors in a Megatron checkpoint, from its config alone. No torch import.

They are the global names that Megatron-Core's sharded state dicts give, with every backend and in every layout. The
first axis of a tensor that holds several pieces numbers experts, or the layers of a dense model, which are stacked.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from moe_train.config.model import ModelConfig

Shapes = dict[str, tuple[int, ...]]

EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
EXPERTS = "mlp.experts.experts."


@dataclass(frozen=True)
class LayerPlace:
    """One transformer layer: its prefix in the checkpoint, its number in HF terms, its index on the stacked axis."""

    prefix: str
    number: int
    stacked_index: int | None
    moe: bool


def layer_places(model: ModelConfig) -> Iterator[LayerPlace]:
    """The layers of the main model, then the transformer layer of each multi-token-prediction depth."""
    pattern = model.moe_layer_pattern
    for number, moe in enumerate(pattern):
        if model.is_moe:
            yield LayerPlace(f"decoder.layers.{number}.", number, None, bool(moe))
        else:
            yield LayerPlace("decoder.layers.", number, number, False)
    for depth in range(model.mtp_num_layers):
        prefix = f"mtp.layers.{depth}.transformer_layer."
        yield LayerPlace(prefix, model.num_layers + depth, None, bool(pattern[-1]))


def model_shapes(model: ModelConfig) -> Shapes:
    """Tensors outside layers."""
    vocabulary = (model.padded_vocab_size, model.hidden_size)
    shapes: Shapes = {EMBEDDING: vocabulary, "decoder.final_layernorm.weight": (model.hidden_size,)}
    return shapes if model.tie_embeddings else {**shapes, HEAD: vocabulary}


def mtp_shapes(model: ModelConfig) -> Shapes:
    """Tensors of a multi-token-prediction depth in addition to those of its transformer layer."""
    hidden = model.hidden_size
    norms: Shapes = {f"{name}.weight": (hidden,) for name in ("enorm", "hnorm", "final_layernorm")}
    return {**norms, "eh_proj.weight": (hidden, 2 * hidden)}


def layer_shapes(model: ModelConfig, moe: bool) -> Shapes:
    """Tensors of one layer. Those of routed experts are of one expert."""
    return {**(_mla(model) if model.attention == "mla" else _gqa(model)), **(_moe(model) if moe else _dense(model))}


def _mla(model: ModelConfig) -> Shapes:
    hidden, heads, rank = model.hidden_size, model.num_attention_heads, model.q_lora_rank
    qk = model.qk_nope_head_dim + model.qk_rope_head_dim
    shapes: Shapes = {
        "input_layernorm.weight": (hidden,),
        "self_attention.linear_kv_down_proj.weight": (model.kv_lora_rank + model.qk_rope_head_dim, hidden),
        "self_attention.linear_kv_up_proj.layer_norm_weight": (model.kv_lora_rank,),
        "self_attention.linear_kv_up_proj.weight": (
            heads * (model.qk_nope_head_dim + model.v_head_dim),
            model.kv_lora_rank,
        ),
        "self_attention.linear_proj.weight": (hidden, heads * model.v_head_dim),
    }
    if not rank:
        return {**shapes, "self_attention.linear_q_proj.weight": (heads * qk, hidden)}
    return {
        **shapes,
        "self_attention.linear_q_down_proj.weight": (rank, hidden),
        "self_attention.linear_q_up_proj.layer_norm_weight": (rank,),
        "self_attention.linear_q_up_proj.weight": (heads * qk, rank),
    }


def _gqa(model: ModelConfig) -> Shapes:
    hidden, heads, groups, size = (
        model.hidden_size,
        model.num_attention_heads,
        model.kv_heads,
        model.attention_head_dim,
    )
    rows = (heads + 2 * groups) * size
    shapes: Shapes = {
        "self_attention.linear_qkv.layer_norm_weight": (hidden,),
        "self_attention.linear_qkv.weight": (rows, hidden),
        "self_attention.linear_proj.weight": (hidden, heads * size),
    }
    if model.qkv_bias:
        shapes["self_attention.linear_qkv.bias"] = (rows,)
    if model.qk_norm != "none":
        whole = model.qk_norm == "full"
        shapes["self_attention.q_layernorm.weight"] = (heads * size if whole else size,)
        shapes["self_attention.k_layernorm.weight"] = (groups * size if whole else size,)
    return shapes


def _dense(model: ModelConfig) -> Shapes:
    hidden, inner = model.hidden_size, model.ffn_hidden_size
    return {
        "mlp.linear_fc1.layer_norm_weight": (hidden,),
        "mlp.linear_fc1.weight": (2 * inner, hidden),
        "mlp.linear_fc2.weight": (hidden, inner),
    }


def _moe(model: ModelConfig) -> Shapes:
    hidden, inner = model.hidden_size, model.moe_ffn_hidden_size
    shapes: Shapes = {
        "pre_mlp_layernorm.weight": (hidden,),
        "mlp.router.weight": (model.num_experts, hidden),
        EXPERTS + "linear_fc1.weight": (2 * inner, hidden),
        EXPERTS + "linear_fc2.weight": (hidden, inner),
    }
    if model.router_bias:
        shapes["mlp.router.expert_bias"] = (model.num_experts,)
    if model.num_shared_experts:
        width = model.shared_expert_width
        shapes["mlp.shared_experts.linear_fc1.weight"] = (2 * width, hidden)
        shapes["mlp.shared_experts.linear_fc2.weight"] = (hidden, width)
        if model.shared_expert_gate:
            shapes["mlp.shared_experts.gate_weight"] = (1, hidden)
    return shapes
