"""Mixtral. No torch import."""

from __future__ import annotations

from moe_train.conversion.hf import names, settings
from moe_train.conversion.hf.family import Family

FAMILY = Family(
    schema=settings.Schema(
        ("mixtral",),
        "MixtralForCausalLM",
        (
            *settings.BACKBONE, settings.GROUPS_OR_NULL, settings.head_dim(settings.head_dim_or_null),
            *settings.experts("intermediate_size", "num_local_experts", "num_experts"),
        ),
        settings.GQA | {"router_score": "softmax", "router_pre_softmax": False},
        settings.ACTIVATION | {"sliding_window": (None,)},
        settings.ALL | {
            "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": None, "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5, "num_experts_per_tok": 2, "num_local_experts": 8,
        },
        rope_base=1e6,
    ),
    layer=names.GQA | names.experts("block_sparse_moe", "w1", "w3", "w2"),
)  # fmt: skip
