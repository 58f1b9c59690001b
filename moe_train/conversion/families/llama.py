"""Llama, dense. No torch import."""

from __future__ import annotations

from moe_train.conversion.hf import names, settings
from moe_train.conversion.hf.family import Family

FAMILY = Family(
    schema=settings.Schema(
        ("llama",),
        "LlamaForCausalLM",
        (*settings.BACKBONE, settings.FFN, settings.GROUPS_OR_NULL, settings.head_dim(settings.stored_head_dim)),
        settings.GQA | {"num_experts": 0},
        settings.ACTIVATION | {"attention_bias": (False,), "mlp_bias": (False,)},
        settings.ALL | {
            "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": None, "head_dim": None,
            "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
        },
    ),
    layer=names.GQA | names.DENSE,
)  # fmt: skip
