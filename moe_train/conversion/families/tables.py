"""How each family of Hugging Face checkpoints names the tensors of a Megatron checkpoint. No torch import.

One table for each family: the Megatron name of a tensor -> its kind and its Hugging Face names. Names of layers are
relative to `model.layers.N.`. A table has an entry for everything that a model of the family can have; which of it a
model does have follows from its config. A new family is a new table here and one of settings in `config.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
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


def _column(name: str) -> Rule:
    return Rule(Kind.COLUMN, (name,), quantised=True)


def _row(name: str) -> Rule:
    return Rule(Kind.ROW, (name,), quantised=True)


def _whole(name: str) -> Rule:
    return Rule(Kind.REPLICATED, (name,))


def _gated(*names: str) -> Rule:
    return Rule(Kind.GATED, names, quantised=True)


_MODEL: Table = {
    EMBEDDING: Rule(Kind.VOCABULARY, ("model.embed_tokens.weight",)),
    HEAD: Rule(Kind.VOCABULARY, ("lm_head.weight",)),
    FINAL_NORM: _whole("model.norm.weight"),
}

_MLA: Table = {
    "input_layernorm.weight": _whole("input_layernorm.weight"),
    "self_attention.linear_q_proj.weight": _column("self_attn.q_proj.weight"),
    "self_attention.linear_q_down_proj.weight": Rule(Kind.LATENT, ("self_attn.q_a_proj.weight",), quantised=True),
    "self_attention.linear_q_up_proj.layer_norm_weight": _whole("self_attn.q_a_layernorm.weight"),
    "self_attention.linear_q_up_proj.weight": _column("self_attn.q_b_proj.weight"),
    "self_attention.linear_kv_down_proj.weight": Rule(
        Kind.LATENT, ("self_attn.kv_a_proj_with_mqa.weight",), quantised=True
    ),
    "self_attention.linear_kv_up_proj.layer_norm_weight": _whole("self_attn.kv_a_layernorm.weight"),
    "self_attention.linear_kv_up_proj.weight": _column("self_attn.kv_b_proj.weight"),
    "self_attention.linear_proj.weight": _row("self_attn.o_proj.weight"),
}

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GQA: Table = {
    "self_attention.linear_qkv.layer_norm_weight": _whole("input_layernorm.weight"),
    "self_attention.linear_qkv.weight": Rule(Kind.QKV, tuple(f"{name}.weight" for name in _QKV), quantised=True),
    "self_attention.linear_qkv.bias": Rule(Kind.QKV, tuple(f"{name}.bias" for name in _QKV)),
    "self_attention.q_layernorm.weight": _whole("self_attn.q_norm.weight"),
    "self_attention.k_layernorm.weight": _whole("self_attn.k_norm.weight"),
    "self_attention.linear_proj.weight": _row("self_attn.o_proj.weight"),
}

_DENSE: Table = {
    "mlp.linear_fc1.layer_norm_weight": _whole("post_attention_layernorm.weight"),
    "mlp.linear_fc1.weight": _gated("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp.linear_fc2.weight": _row("mlp.down_proj.weight"),
}


def _moe(block: str = "mlp", gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj") -> Table:
    """Router and routed experts below `block`. transformers also saves them as `mlp`, as its own modules are called."""
    expert = f"{block}.experts.{{expert}}"
    renamed = () if block == "mlp" else ("mlp.gate.weight",)
    return {
        "pre_mlp_layernorm.weight": _whole("post_attention_layernorm.weight"),
        "mlp.router.weight": Rule(Kind.REPLICATED, (f"{block}.gate.weight",), others=renamed),
        "mlp.router.expert_bias": _whole(f"{block}.gate.e_score_correction_bias"),
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


def _shared(block: str = "mlp.shared_experts") -> Table:
    return {
        "mlp.shared_experts.linear_fc1.weight": _gated(f"{block}.gate_proj.weight", f"{block}.up_proj.weight"),
        "mlp.shared_experts.linear_fc2.weight": _row(f"{block}.down_proj.weight"),
        "mlp.shared_experts.gate_weight": _whole("mlp.shared_expert_gate.weight"),
    }


_MTP: Table = {
    "enorm.weight": _whole("enorm.weight"),
    "hnorm.weight": _whole("hnorm.weight"),
    "eh_proj.weight": Rule(Kind.COLUMN, ("eh_proj.weight",)),  # releases keep it in bf16
    "final_layernorm.weight": _whole("shared_head.norm.weight"),
}


@dataclass(frozen=True)
class Family:
    """The names of one family."""

    layer: Table
    model: Table = field(default_factory=lambda: _MODEL)
    mtp: Table = field(default_factory=dict)
    mtp_copies: dict[str, str] = field(default_factory=dict)
    """Megatron name of a tensor -> its second name, in every multi-token-prediction layer."""
    ignored: tuple[str, ...] = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)
    """Patterns of names without weights, which older versions of transformers wrote."""


_MTP_COPIES = {EMBEDDING: "embed_tokens.weight", HEAD: "shared_head.head.weight"}

FAMILIES: dict[str, Family] = {
    "deepseek_v3": Family(_MLA | _DENSE | _moe() | _shared(), mtp=_MTP, mtp_copies=_MTP_COPIES),
    "deepseek_v2": Family(_MLA | _DENSE | _moe() | _shared()),
    "deepseek_moe": Family(_GQA | _DENSE | _moe() | _shared()),
    "mixtral": Family(_GQA | _moe("block_sparse_moe", "w1", "w3", "w2")),
    "qwen3_moe": Family(_GQA | _DENSE | _moe()),
    "qwen2_moe": Family(_GQA | _DENSE | _moe() | _shared("mlp.shared_expert")),
    "olmoe": Family(_GQA | _moe()),
    "glm4_moe": Family(_GQA | _DENSE | _moe() | _shared(), mtp=_MTP, mtp_copies=_MTP_COPIES),
    "llama": Family(_GQA | _DENSE),
}
