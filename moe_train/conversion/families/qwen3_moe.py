"""Qwen3 with experts. No torch import."""

from __future__ import annotations

from moe_train.conversion.hf import names, settings
from moe_train.conversion.hf.family import Family

FAMILY = Family(
    schema=settings.Schema(
        ("qwen3_moe",),
        "Qwen3MoeForCausalLM",
        (
            *settings.BACKBONE, settings.FFN, settings.GROUPS, settings.head_dim(settings.stored_head_dim),
            *settings.experts("moe_intermediate_size", "num_experts", "num_local_experts"),
        ),
        settings.GQA | {"router_score": "softmax", "qk_norm": "head"},
        settings.ACTIVATION | {
            "decoder_sparse_step": (1,), "norm_topk_prob": (False, True), "attention_bias": (False,),
            "use_sliding_window": (False,),
        },
        settings.ALL | {
            "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 24,
            "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": None, "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6, "moe_intermediate_size": 768, "num_experts_per_tok": 8, "num_experts": 128,
        },
        unnormalised_topk=True,
        **settings.LEADING_LAYERS,
        harmless={"sliding_window": None},  # means nothing without use_sliding_window
    ),
    layer=names.GQA | names.DENSE | names.experts(),
)  # fmt: skip
