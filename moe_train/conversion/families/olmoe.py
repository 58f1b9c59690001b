"""OLMoE. No torch import."""

from __future__ import annotations

from moe_train.conversion.hf import names, settings
from moe_train.conversion.hf.family import Family

FAMILY = Family(
    schema=settings.Schema(
        ("olmoe",),
        "OlmoeForCausalLM",
        (
            *settings.BACKBONE, settings.GROUPS_OR_NULL, settings.head_dim(settings.unusual_head_dim),
            *settings.experts("intermediate_size", "num_experts", "num_local_experts"),
        ),
        settings.GQA | {"router_score": "softmax", "qk_norm": "full"},
        settings.ACTIVATION | {"norm_topk_prob": (False, True), "attention_bias": (False,), "clip_qkv": (None,)},
        settings.ALL | {
            "vocab_size": 50304, "hidden_size": 2048, "intermediate_size": 2048, "num_hidden_layers": 16,
            "num_attention_heads": 16, "num_key_value_heads": None, "head_dim": None, "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5, "num_experts_per_tok": 8, "num_experts": 64,
        },
        unnormalised_topk=True,
    ),
    layer=names.GQA | names.experts(),
)  # fmt: skip
