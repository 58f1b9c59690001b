"""MiniMax-M2. No torch import."""

from __future__ import annotations

from pathlib import Path

from moe_train.conversion.hf import names, settings
from moe_train.conversion.hf.family import Family
from moe_train.conversion.hf.names import Kind, Rule
from moe_train.conversion.hf.settings import UNSUPPORTED, Json
from parallel.errors import CheckpointError

_FULL_ATTENTION = 1  # in attn_type_list, where MiniMax-01 has 0 for linear attention


def _attention_types(config: Json, values: Json, where: Path | str) -> Json:
    """Every layer has full attention."""
    types = config.get("attn_type_list")
    if types is not None and types != [_FULL_ATTENTION] * values["num_layers"]:
        raise CheckpointError(
            f"{where} has attn_type_list={str(types)[:100]}, and the {values['num_layers']} layers here all have type "
            f"{_FULL_ATTENTION}",
            UNSUPPORTED,
        )
    return {}


FAMILY = Family(
    schema=settings.Schema(
        ("minimax_m2",),
        "MiniMaxM2ForCausalLM",
        (
            *settings.BACKBONE, settings.GROUPS,
            settings.Setting("head_dim", "head_dim", write=settings.stored_head_dim),
            *settings.experts("intermediate_size", "num_local_experts", "num_experts"),
        ),
        settings.GQA | {"router_score": "sigmoid", "router_bias": True, "qk_norm": "full"},
        settings.ACTIVATION | {
            "scoring_func": ("sigmoid",), "use_routing_bias": (True,), "use_qk_norm": (True,),
            "qk_norm_type": ("per_layer",),
        },
        settings.ALL | {
            "vocab_size": 200064, "hidden_size": 3072, "intermediate_size": 1536, "num_hidden_layers": 62,
            "num_attention_heads": 48, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 196608,
            "rms_norm_eps": 1e-6, "num_experts_per_tok": 8, "num_local_experts": 256,
        },
        rope_base=5e6,
        rotary_dim_key="rotary_dim",
        # The release describes three MTP modules (use_mtp, num_mtp_modules) and has no weights of them.
        neutral={
            "shared_intermediate_size": (0, None), "layernorm_full_attention_beta": (1.0,),
            "layernorm_mlp_beta": (1.0,),
        },
        further_keys=("attn_type_list",),
        read_further=_attention_types,
    ),
    layer=names.GQA | names.experts("block_sparse_moe", "w1", "w3", "w2") | {
        # Next to the router's weight and not inside of its module.
        "mlp.router.expert_bias": Rule(
            Kind.REPLICATED, ("block_sparse_moe.e_score_correction_bias",), others=("mlp.e_score_correction_bias",)
        ),
    },
)  # fmt: skip
