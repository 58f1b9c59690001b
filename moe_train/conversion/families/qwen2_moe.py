"""Qwen2 with experts. No torch import."""

from __future__ import annotations

from moe_train.conversion.hf import names, settings
from moe_train.conversion.hf.family import Family

FAMILY = Family(
    schema=settings.Schema(
        ("qwen2_moe",),
        "Qwen2MoeForCausalLM",
        (
            *settings.BACKBONE, settings.FFN, settings.GROUPS, settings.head_dim(settings.unusual_head_dim),
            *settings.experts("moe_intermediate_size", "num_experts", "num_local_experts"),
            settings.Setting("shared_expert_intermediate_size", "shared_expert_ffn_hidden_size"),
            settings.Setting("qkv_bias", "qkv_bias"),
        ),
        settings.GQA | {"router_score": "softmax", "num_shared_experts": 1, "shared_expert_gate": True},
        settings.ACTIVATION | {
            "decoder_sparse_step": (1,), "norm_topk_prob": (False, True), "use_sliding_window": (False,),
        },
        settings.ALL | {
            "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24,
            "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": None, "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632,
            "num_experts_per_tok": 4, "num_experts": 60, "qkv_bias": True,
        },
        unnormalised_topk=True,
        **settings.LEADING_LAYERS,
        harmless={"sliding_window": None},  # means nothing without use_sliding_window
    ),
    layer=names.GQA | names.DENSE | names.experts() | names.shared_experts("mlp.shared_expert"),
)  # fmt: skip
