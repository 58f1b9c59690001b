"""DeepSeek-V2 and -V2-Lite. No torch import."""

from __future__ import annotations

from pathlib import Path

from moe_train.conversion.hf import names, settings
from moe_train.conversion.hf.family import Family
from moe_train.conversion.hf.settings import RESTORE, UNSUPPORTED, Json
from parallel.errors import CheckpointError


def _groups(config: Json, values: Json, where: Path | str) -> Json:
    """Routing by groups is chosen by `topk_method`, and without it the groups mean nothing."""
    method = config.get("topk_method", "greedy")
    if method not in ("greedy", "group_limited_greedy"):
        raise CheckpointError(
            f"{where} has topk_method={method!r}, and deepseek_v2 models here have 'greedy' or 'group_limited_greedy'",
            UNSUPPORTED,
        )
    if method == "group_limited_greedy":
        for name in ("n_group", "topk_group"):
            if config.get(name) is None:
                raise CheckpointError(f"{where} has topk_method={method!r} and no {name}", RESTORE)
        if values["router_num_groups"]:
            return {}
    return {"router_num_groups": 0, "router_topk_groups": 0, "router_group_score": "sum"}


FAMILY = Family(
    schema=settings.Schema(
        ("deepseek_v2",),
        "DeepseekV2ForCausalLM",
        (
            *settings.BACKBONE, settings.FFN, *settings.MLA, *settings.DEEPSEEK_EXPERTS, settings.SHARED,
            *settings.expert_groups(nullable=True),
        ),
        {"attention": "mla", "router_score": "softmax", "router_pre_softmax": True, "router_group_score": "max"},
        settings.ACTIVATION | settings.EVERY_LAYER | {
            "scoring_func": ("softmax",), "norm_topk_prob": (False,), "attention_bias": (False,),
            "mlp_bias": (False,),
        },
        settings.ALL | {
            "vocab_size": 102400, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 32, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
            "first_k_dense_replace": 0, "kv_lora_rank": 512, "q_lora_rank": 1536, "n_group": None,
            "n_routed_experts": 64, "n_shared_experts": 2, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
            "routed_scaling_factor": 1.0, "topk_group": None, "v_head_dim": 128, "moe_intermediate_size": 1407,
        },
        harmless={"rope_interleave": None},  # pairs are always interleaved
        further_keys=("topk_method",),
        read_further=_groups,
        write_further=lambda model: {"topk_method": "group_limited_greedy" if model.router_num_groups else "greedy"},
    ),
    layer=names.MLA | names.DENSE | names.experts() | names.shared_experts(),
)  # fmt: skip
