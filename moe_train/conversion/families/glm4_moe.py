"""GLM-4.5, with and without Air. No torch import."""

from __future__ import annotations

from moe_train.conversion.hf import names, settings
from moe_train.conversion.hf.family import Family

FAMILY = Family(
    schema=settings.Schema(
        ("glm4_moe",),
        "Glm4MoeForCausalLM",
        (
            *settings.BACKBONE, settings.FFN, settings.GROUPS, settings.head_dim(settings.stored_head_dim),
            *settings.DEEPSEEK_EXPERTS, settings.SHARED,
            *settings.expert_groups(nullable=False), settings.MTP,
            settings.Setting("attention_bias", "qkv_bias"),
            settings.Setting("use_qk_norm", "qk_norm", lambda on: {True: "head", False: "none"}.get(on, on),
                    lambda model: model.qk_norm == "head"),
        ),
        settings.GQA | settings.SIGMOID,
        settings.ACTIVATION | {"norm_topk_prob": (True,)},
        settings.ALL | {
            "vocab_size": 151552, "hidden_size": 4096, "intermediate_size": 10944, "num_hidden_layers": 46,
            "num_attention_heads": 96, "num_key_value_heads": 8, "head_dim": None, "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5, "attention_bias": False, "moe_intermediate_size": 1408, "num_experts_per_tok": 8,
            "n_shared_experts": 1, "n_routed_experts": 128, "routed_scaling_factor": 1.0, "n_group": 1,
            "topk_group": 1, "first_k_dense_replace": 1, "use_qk_norm": False, "num_nextn_predict_layers": 1,
        },
        rotary_share=0.5,
        harmless={"scoring_func": ("sigmoid", None), "topk_method": ("noaux_tc", None)},
    ),
    layer=names.GQA | names.DENSE | names.experts() | names.shared_experts(),
    mtp=names.MTP,
    mtp_copies=names.MTP_COPIES,
)  # fmt: skip
