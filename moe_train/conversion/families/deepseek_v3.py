"""DeepSeek-V3, and models with its code: Kimi K2, Moonlight. No torch import."""

from __future__ import annotations

from moe_train.conversion.hf import names, settings
from moe_train.conversion.hf.family import Family

FAMILY = Family(
    schema=settings.Schema(
        ("deepseek_v3", "kimi_k2"),
        "DeepseekV3ForCausalLM",
        (
            *settings.BACKBONE, settings.FFN, *settings.MLA, *settings.DEEPSEEK_EXPERTS, settings.SHARED,
            *settings.expert_groups(nullable=False), settings.MTP,
        ),
        {"attention": "mla", **settings.SIGMOID},
        settings.ACTIVATION | settings.EVERY_LAYER | {
            "scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",), "norm_topk_prob": (True,),
            "attention_bias": (False,), "rope_interleave": (True,),
        },
        settings.ALL | {
            "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
            "num_hidden_layers": 61, "num_attention_heads": 128, "n_shared_experts": 1, "n_routed_experts": 256,
            "routed_scaling_factor": 2.5, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64,
            "v_head_dim": 128, "qk_nope_head_dim": 128, "n_group": 8, "topk_group": 4, "num_experts_per_tok": 8,
            "first_k_dense_replace": 3, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6,
            "num_nextn_predict_layers": 1,
        },
    ),
    layer=names.MLA | names.DENSE | names.experts() | names.shared_experts(),
    mtp=names.MTP,
    mtp_copies=names.MTP_COPIES,
)  # fmt: skip
