"""DeepSeekMoE, whose code comes with its weights. No torch import."""

from __future__ import annotations

from moe_train.conversion.hf import names, settings
from moe_train.conversion.hf.family import Family

FAMILY = Family(
    schema=settings.Schema(
        ("deepseek",),
        "DeepseekForCausalLM",
        (
            *settings.BACKBONE, settings.FFN, settings.GROUPS_OR_NULL, *settings.DEEPSEEK_EXPERTS,
            settings.SHARED_OR_NULL,
        ),
        settings.GQA | {"router_score": "softmax", "router_pre_softmax": True},
        settings.ACTIVATION | settings.EVERY_LAYER | {
            "scoring_func": ("softmax",), "norm_topk_prob": (False, True), "attention_bias": (False,),
        },
        settings.ALL | {
            "vocab_size": 102400, "hidden_size": 4096, "intermediate_size": 11008, "moe_intermediate_size": 1407,
            "num_hidden_layers": 30, "num_attention_heads": 32, "num_key_value_heads": 32, "n_shared_experts": None,
            "first_k_dense_replace": 0, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
        },
        unnormalised_topk=True,
    ),
    layer=names.GQA | names.DENSE | names.experts() | names.shared_experts(),
)  # fmt: skip
