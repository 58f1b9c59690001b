"""Names of Hugging Face tensors, and how their rows make up Megatron tensors. No torch import.

A table has the Megatron name of a tensor -> its kind and its Hugging Face names, relative to `model.layers.N.`. Tables
here are what several families have in common; a family combines them (`moe_train.conversion.families`). A table
has an entry for everything that a model of the family can have; which of it a model does have follows from its config.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from parallel.architecture.layers import EMBEDDING, EXPERTS, FINAL_NORM, HEAD


class Kind(Enum):
    """How the rows of Hugging Face tensors make up the rows of one Megatron tensor, and how ranks split it."""

    COLUMN = "rows split over tensor-parallel ranks"
    ROW = "columns split over tensor-parallel ranks"
    REPLICATED = "whole on every tensor-parallel rank: norms, routers, biases of experts"
    LATENT = "a down-projection of multi-latent attention: whole on every rank, but a linear layer like others"
    VOCABULARY = "one row for each token, padded with zeros in Megatron"
    QKV = "queries, keys and values: in Megatron by key/value group, each its queries, then its key and value"
    GATED = "gate and up of SwiGLU: in Megatron one after the other"


@dataclass(frozen=True)
class Rule:
    """The Hugging Face names of one Megatron tensor, in the order of its rows. `{expert}` numbers routed experts."""

    kind: Kind
    names: tuple[str, ...]
    quantised: bool = False
    """Whether releases in FP8 hold it in FP8."""
    fused: tuple[str, int, int] | None = None
    """A tensor of all experts that can replace `names`: its name, which part of it this is, of how many."""
    others: tuple[str, ...] = ()
    """Names of another layout of the same tensors, in the order of `names`: read, not written."""


Table = dict[str, Rule]


def column(name: str) -> Rule:
    """A weight whose rows are split."""
    return Rule(Kind.COLUMN, (name,), quantised=True)


def row(name: str) -> Rule:
    """A weight whose columns are split."""
    return Rule(Kind.ROW, (name,), quantised=True)


def whole(name: str) -> Rule:
    """A tensor that every rank holds."""
    return Rule(Kind.REPLICATED, (name,))


def gated(*names: str) -> Rule:
    """Gate and up of SwiGLU."""
    return Rule(Kind.GATED, names, quantised=True)


MODEL: Table = {
    EMBEDDING: Rule(Kind.VOCABULARY, ("model.embed_tokens.weight",)),
    HEAD: Rule(Kind.VOCABULARY, ("lm_head.weight",)),
    FINAL_NORM: whole("model.norm.weight"),
}

MLA: Table = {
    "input_layernorm.weight": whole("input_layernorm.weight"),
    "self_attention.linear_q_proj.weight": column("self_attn.q_proj.weight"),
    "self_attention.linear_q_down_proj.weight": Rule(Kind.LATENT, ("self_attn.q_a_proj.weight",), quantised=True),
    "self_attention.linear_q_up_proj.layer_norm_weight": whole("self_attn.q_a_layernorm.weight"),
    "self_attention.linear_q_up_proj.weight": column("self_attn.q_b_proj.weight"),
    "self_attention.linear_kv_down_proj.weight": Rule(
        Kind.LATENT, ("self_attn.kv_a_proj_with_mqa.weight",), quantised=True
    ),
    "self_attention.linear_kv_up_proj.layer_norm_weight": whole("self_attn.kv_a_layernorm.weight"),
    "self_attention.linear_kv_up_proj.weight": column("self_attn.kv_b_proj.weight"),
    "self_attention.linear_proj.weight": row("self_attn.o_proj.weight"),
}

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GQA: Table = {
    "self_attention.linear_qkv.layer_norm_weight": whole("input_layernorm.weight"),
    "self_attention.linear_qkv.weight": Rule(Kind.QKV, tuple(f"{name}.weight" for name in _QKV), quantised=True),
    "self_attention.linear_qkv.bias": Rule(Kind.QKV, tuple(f"{name}.bias" for name in _QKV)),
    "self_attention.q_layernorm.weight": whole("self_attn.q_norm.weight"),
    "self_attention.k_layernorm.weight": whole("self_attn.k_norm.weight"),
    "self_attention.linear_proj.weight": row("self_attn.o_proj.weight"),
}

DENSE: Table = {
    "mlp.linear_fc1.layer_norm_weight": whole("post_attention_layernorm.weight"),
    "mlp.linear_fc1.weight": gated("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp.linear_fc2.weight": row("mlp.down_proj.weight"),
}


def experts(block: str = "mlp", gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj") -> Table:
    """Router and routed experts below `block`. transformers also saves them as `mlp`, as its own modules are called."""
    expert = f"{block}.experts.{{expert}}"
    renamed = () if block == "mlp" else ("mlp.gate.weight",)
    return {
        "pre_mlp_layernorm.weight": whole("post_attention_layernorm.weight"),
        "mlp.router.weight": Rule(Kind.REPLICATED, (f"{block}.gate.weight",), others=renamed),
        "mlp.router.expert_bias": whole(f"{block}.gate.e_score_correction_bias"),
        EXPERTS + "linear_fc1.weight": Rule(
            Kind.GATED,
            (f"{expert}.{gate}.weight", f"{expert}.{up}.weight"),
            quantised=True,
            fused=("mlp.experts.gate_up_proj", 0, 2),
        ),
        EXPERTS + "linear_fc2.weight": Rule(
            Kind.ROW, (f"{expert}.{down}.weight",), quantised=True, fused=("mlp.experts.down_proj", 0, 1)
        ),
    }


def shared_experts(block: str = "mlp.shared_experts") -> Table:
    """All shared experts, which Megatron-Core keeps as one wide one, below `block`."""
    return {
        "mlp.shared_experts.linear_fc1.weight": gated(f"{block}.gate_proj.weight", f"{block}.up_proj.weight"),
        "mlp.shared_experts.linear_fc2.weight": row(f"{block}.down_proj.weight"),
        "mlp.shared_experts.gate_weight": whole("mlp.shared_expert_gate.weight"),
    }


MTP: Table = {
    "enorm.weight": whole("enorm.weight"),
    "hnorm.weight": whole("hnorm.weight"),
    "eh_proj.weight": Rule(Kind.COLUMN, ("eh_proj.weight",)),  # releases keep it in bf16
    "final_layernorm.weight": whole("shared_head.norm.weight"),
}

MTP_COPIES = {EMBEDDING: "embed_tokens.weight", HEAD: "shared_head.head.weight"}
"""Megatron name of a tensor -> its second name, in every multi-token-prediction layer."""
