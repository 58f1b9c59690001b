"""Megatron-Core's configuration class, options and modules of each kind of attention: one row each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron.core import tensor_parallel
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import MLASelfAttentionSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from moe_train.config.model import ModelConfig
from moe_train.model.local.attention import SpecifiedLatentAttention
from moe_train.model.local.norm import KeyAllHeadsRMSNorm, QueryAllHeadsRMSNorm
from parallel.architecture.attention import attention_kind, row_of

if TYPE_CHECKING:
    from moe_train.model.specs import LocalBackend


@dataclass(frozen=True)
class AttentionModules:
    """One kind of attention in Megatron-Core.

    Args:
        config_class: class of the transformer's configuration.
        options: its options for a model.
        local_spec: the attention of a layer, with the modules of the `local` backend.
        change_te_spec: changes in place what upstream has no option for, in the attention of a layer that upstream
            composes of Transformer Engine's modules.
    """

    config_class: type[TransformerConfig]
    options: Callable[[ModelConfig], dict[str, Any]]
    local_spec: Callable[[LocalBackend, ModelConfig], ModuleSpec]
    change_te_spec: Callable[[ModuleSpec, ModelConfig], None]


def attention_modules(model: ModelConfig) -> AttentionModules:
    """The row of the model's attention.

    Raises:
        NotImplementedError: it has none.
    """
    place = "ATTENTION_MODULES of moe_train/model/attention_modules.py"
    return row_of(attention_kind(model), ATTENTION_MODULES, place)


def _latent_options(model: ModelConfig) -> dict[str, Any]:
    yarn = {
        "rotary_scaling_factor": model.yarn_factor,
        "original_max_position_embeddings": model.yarn_original_max_position,
        "beta_fast": model.yarn_beta_fast,
        "beta_slow": model.yarn_beta_slow,
        "mscale": model.yarn_mscale,
        "mscale_all_dim": model.yarn_mscale_all_dim,
    }
    return {
        "multi_latent_attention": True,
        "q_lora_rank": model.q_lora_rank or None,
        "kv_lora_rank": model.kv_lora_rank,
        "qk_head_dim": model.qk_nope_head_dim,
        "qk_pos_emb_head_dim": model.qk_rope_head_dim,
        "v_head_dim": model.v_head_dim,
        "qk_layernorm": True,
        "rope_type": model.rope_type,
        "rotary_base": model.rope_base,
        # Upstream scales the softmax by the YaRN temperature even for plain rotary embedding: 1.0 and 0.0 mean none.
        **(yarn if model.rope_type == "yarn" else {"rotary_scaling_factor": 1.0, "mscale_all_dim": 0.0}),
    }


def _latent_local_spec(backend: LocalBackend, model: ModelConfig) -> ModuleSpec:
    linear, norm = backend.column_parallel_linear(), backend.layer_norm()
    linears = {f"linear_{name}": linear for name in ("q_proj", "q_up_proj", "kv_up_proj")}
    # Upstream takes only its own class here; `MultiLatentAttention` replaces these two layers.
    linears |= dict.fromkeys(("linear_q_down_proj", "linear_kv_down_proj"), tensor_parallel.ColumnParallelLinear)
    submodules = MLASelfAttentionSubmodules(
        **linears,
        linear_proj=backend.row_parallel_linear(),
        core_attention=backend.core_attention(),
        q_layernorm=norm if model.q_lora_rank else IdentityOp,  # an uncompressed query has none
        kv_layernorm=norm,
    )
    return ModuleSpec(backend.latent_attention(), {"attn_mask_type": AttnMaskType.causal}, submodules)


def _change_latent_te_spec(attention: ModuleSpec, model: ModelConfig) -> None:
    attention.module = SpecifiedLatentAttention


def _grouped_options(model: ModelConfig) -> dict[str, Any]:
    return {
        "num_query_groups": model.kv_heads,
        "kv_channels": model.attention_head_dim,
        "qk_layernorm": model.qk_norm != "none",
        "add_qkv_bias": model.qkv_bias,
    }


def _grouped_local_spec(backend: LocalBackend, model: ModelConfig) -> ModuleSpec:
    norm = backend.layer_norm()
    norms = {
        "head": (norm, norm),
        "full": (QueryAllHeadsRMSNorm, KeyAllHeadsRMSNorm),
        "none": (IdentityOp, IdentityOp),
    }
    q_norm, k_norm = norms[model.qk_norm]
    submodules = SelfAttentionSubmodules(
        linear_qkv=backend.column_parallel_linear(),
        linear_proj=backend.row_parallel_linear(),
        core_attention=backend.core_attention(),
        q_layernorm=q_norm,
        k_layernorm=k_norm,
    )
    return ModuleSpec(SelfAttention, {"attn_mask_type": AttnMaskType.causal}, submodules)


def _change_grouped_te_spec(attention: ModuleSpec, model: ModelConfig) -> None:
    if model.qk_norm == "full":
        attention.submodules.q_layernorm = QueryAllHeadsRMSNorm
        attention.submodules.k_layernorm = KeyAllHeadsRMSNorm


ATTENTION_MODULES = {
    "mla": AttentionModules(
        config_class=MLATransformerConfig, options=_latent_options, local_spec=_latent_local_spec,
        change_te_spec=_change_latent_te_spec,
    ),
    "gqa": AttentionModules(
        config_class=TransformerConfig, options=_grouped_options, local_spec=_grouped_local_spec,
        change_te_spec=_change_grouped_te_spec,
    ),
}  # fmt: skip
