"""GLM-4.7-Flash: DeepSeek-V3's layers under GLM's name. No torch import."""

from __future__ import annotations

from pathlib import Path

from moe_train.config.model import ModelConfig
from moe_train.conversion.hf import names, settings
from moe_train.conversion.hf.family import Family
from moe_train.conversion.hf.settings import UNSUPPORTED, Json, wrong
from parallel.errors import CheckpointError

_DENSE, _SPARSE = "dense", "sparse"
_DEFAULT_DENSE = 1


def _dense_layers(config: Json, values: Json, where: Path | str) -> Json:
    """Leading dense layers: `mlp_layer_types`, a list, in transformers; `first_k_dense_replace` in the release.

    transformers ignores the number, and takes one layer where the list is missing.
    """
    types, count = config.get("mlp_layer_types"), config.get("first_k_dense_replace")
    if types is None:
        if count not in (None, _DEFAULT_DENSE):
            raise CheckpointError(
                f"{where} has first_k_dense_replace={count} and no mlp_layer_types, without which transformers has "
                f"{_DEFAULT_DENSE} dense layer",
                "add mlp_layer_types, one of dense and sparse for each layer",
            )
        return {"num_dense_layers": _DEFAULT_DENSE}
    if not isinstance(types, list) or len(types) != values["num_layers"]:
        raise wrong(where, "mlp_layer_types", types, f"not a list of {values['num_layers']} layers")
    dense = types.count(_DENSE)
    if types != _layer_types(dense, len(types)):
        raise CheckpointError(
            f"{where} has mlp_layer_types={str(types)[:100]}, and dense layers here are the first ones", UNSUPPORTED
        )
    if count not in (None, dense):
        raise CheckpointError(
            f"{where} has first_k_dense_replace={count} and {dense} dense layers in mlp_layer_types",
            "keep the right one",
        )
    return {"num_dense_layers": dense}


def _layer_types(dense: int, layers: int) -> list[str]:
    return [_DENSE] * dense + [_SPARSE] * (layers - dense)


def _written_dense_layers(model: ModelConfig) -> Json:
    dense = model.num_dense_layers
    return {"first_k_dense_replace": dense, "mlp_layer_types": _layer_types(dense, model.num_layers)}


FAMILY = Family(
    schema=settings.Schema(
        ("glm4_moe_lite",),
        "Glm4MoeLiteForCausalLM",
        (
            *settings.BACKBONE, settings.FFN, *settings.MLA, settings.SHARED,
            *settings.experts("moe_intermediate_size", "n_routed_experts", "num_local_experts"),
            *settings.expert_groups(nullable=False), settings.MTP,
        ),
        {"attention": "mla", **settings.SIGMOID},
        settings.ACTIVATION | {
            "topk_method": ("noaux_tc",), "norm_topk_prob": (True,), "attention_bias": (False,),
            "rope_interleave": (True,),
        },
        settings.ALL | {
            "vocab_size": 154880, "hidden_size": 2048, "intermediate_size": 10240, "moe_intermediate_size": 1536,
            "num_hidden_layers": 47, "num_attention_heads": 20, "n_shared_experts": 1, "n_routed_experts": 64,
            "routed_scaling_factor": 1.8, "kv_lora_rank": 512, "q_lora_rank": 768, "qk_rope_head_dim": 64,
            "v_head_dim": 256, "qk_nope_head_dim": 192, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 4,
            "max_position_embeddings": 202752, "rms_norm_eps": 1e-5, "num_nextn_predict_layers": 0,
        },
        harmless={"scoring_func": ("sigmoid", None)},
        further_keys=("first_k_dense_replace", "mlp_layer_types"),
        read_further=_dense_layers,
        write_further=_written_dense_layers,
    ),
    layer=names.MLA | names.DENSE | names.experts() | names.shared_experts(),
    mtp=names.MTP,
    mtp_copies=names.MTP_COPIES,
)  # fmt: skip
