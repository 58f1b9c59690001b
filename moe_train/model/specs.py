"""Which module implements what. One provider class for each backend; Megatron-Core's spec functions do the rest."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_decoder_layer_specs,
    get_gpt_mtp_block_spec,
    get_gpt_mtp_block_spec_for_backend,
    get_mlp_module_spec_for_backend,
)
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from moe_train.config.model import ModelConfig
from moe_train.model.attention_modules import attention_modules
from moe_train.model.fp8.linear import Recipe, in_fp8, with_linears
from moe_train.model.kernels.gemm import ColumnParallelLinear, RowParallelLinear
from moe_train.model.local.attention import CoreAttention, MultiLatentAttention
from moe_train.model.local.experts import GroupedExperts
from moe_train.model.local.norm import ApexRMSNorm, RMSNorm
from moe_train.model.local.router import set_router
from moe_train.model.local.swiglu import SwiGLU
from parallel.architecture.layers import describe_layer


class LocalBackend(LocalSpecProvider):
    """Megatron-Core's own modules with torch attention and norm: the CPU, and CUDA without Transformer Engine.

    With an FP8 `recipe`, every linear layer that it provides emulates the recipe (CPU only).
    """

    def __init__(self, apex: bool = False, recipe: Recipe | None = None) -> None:
        self.apex, self.recipe = apex, recipe

    def core_attention(self) -> type:
        """Torch's scaled-dot-product attention."""
        return CoreAttention

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False) -> type:
        """Torch's RMSNorm, or apex's fused one where the config asks for it. Every model here uses RMSNorm."""
        return ApexRMSNorm if self.apex else RMSNorm

    def column_parallel_linear(self) -> type:
        """Upstream's, with faster GEMMs on the CPU."""
        return in_fp8(ColumnParallelLinear, self.recipe)

    def row_parallel_linear(self) -> type:
        """Upstream's, with faster GEMMs on the CPU."""
        return in_fp8(RowParallelLinear, self.recipe)

    def activation_func(self) -> type:
        """SwiGLU of a CPU, which upstream takes where its config has `use_te_activation_func`."""
        return SwiGLU

    def latent_attention(self) -> type:
        """Multi-head latent attention."""
        return with_linears(MultiLatentAttention, "down_projection", self.recipe)

    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool, *legacy: bool) -> Any:
        """All local experts in one grouped GEMM, or a GEMM per expert. Before 0.19 upstream wants submodules too."""
        if not moe_use_grouped_gemm:
            upstream = super().grouped_mlp_modules(moe_use_grouped_gemm, *legacy)
            if self.recipe is not None:
                submodules = upstream[1] if legacy else upstream.keywords["submodules"]
                submodules.linear_fc1, submodules.linear_fc2 = self.column_parallel_linear(), self.row_parallel_linear()
            return upstream
        experts = with_linears(GroupedExperts, "linear", self.recipe)
        return (experts, None) if legacy else experts


def _local_layer(backend: LocalBackend, model: ModelConfig, moe: bool, grouped_gemm: bool) -> ModuleSpec:
    """One transformer layer, as upstream's `get_gpt_layer_local_spec` lays it out, with the modules of `backend`."""
    norm = backend.layer_norm()
    mlp = get_mlp_module_spec_for_backend(
        backend,
        num_experts=model.num_experts if moe else None,
        moe_grouped_gemm=grouped_gemm and moe,
        use_te_activation_func=True,
    )
    set_router(mlp, model)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=attention_modules(model).local_spec(backend, model),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=checkpoint_names(model, moe),
        ),
    )


def checkpoint_names(model: ModelConfig, moe: bool) -> dict[str, str]:
    """Local names of a layer's norms -> their names in checkpoints, which are those of Transformer Engine's modules.

    Those fuse a norm into the linear layer behind it, where there is one alone (models/gpt/gpt_layer_specs.py,
    `get_gpt_layer_with_transformer_engine_spec`): so one backend reads what the other wrote.
    """
    norms = [norm for norm in describe_layer(model, moe).norms if norm.local]
    return {norm.local.removesuffix("weight"): norm.name.removesuffix("weight") for norm in norms}


def _layer_ids(config: TransformerConfig, vp_stage: int | None) -> list[int]:
    """Decoder layers (from 0) of this rank's chunk `vp_stage`."""
    if config.pipeline_model_parallel_layout is None:
        offset = get_transformer_layer_offset(config, vp_stage=vp_stage)
        return list(range(offset, offset + config.num_layers // config.pipeline_model_parallel_size))
    return config.pipeline_model_parallel_layout.get_layer_id_list(layer_type=LayerType.decoder, vp_stage=vp_stage)


def local_specs(
    config: TransformerConfig,
    model: ModelConfig,
    backend: LocalBackend,
    vp_stage: int | None,
    high_precision: Collection[int] = (),
) -> tuple[Any, Any]:
    """Block spec of this rank's chunk, and the spec of its multi-token-prediction block (None where there is none).

    Args:
        high_precision: decoder layers (from 0) that are not in FP8 where the backend is.
    """
    kinds = {
        (moe, high): _local_layer(
            LocalBackend(backend.apex, None if high else backend.recipe), model, moe, config.moe_grouped_gemm
        )
        for moe in {bool(moe) for moe in model.moe_layer_pattern}
        for high in {i in high_precision for i in range(model.num_layers)} | {False}
    }
    pattern = [bool(moe) for moe in model.moe_layer_pattern]
    block = TransformerBlockSubmodules(
        layer_specs=[kinds[pattern[i], i in high_precision] for i in _layer_ids(config, vp_stage)],
        layer_norm=backend.layer_norm(),
    )
    mtp = None
    if model.mtp_num_layers:  # upstream keeps no part of it in bf16 (transformer/multi_token_prediction.py)
        mtp = get_gpt_mtp_block_spec_for_backend(config, kinds[pattern[-1], False], backend, vp_stage=vp_stage)
    return block, mtp


def te_specs(config: TransformerConfig, model: ModelConfig, vp_stage: int | None) -> tuple[Any, Any]:
    """The same with Transformer Engine's modules, as upstream composes them."""
    block = get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=vp_stage)
    for layer in block.layer_specs:
        _apply_model_options(layer, model)
    mtp = None
    if model.mtp_num_layers:
        last = get_gpt_decoder_layer_specs(config, use_transformer_engine=True)[-1]
        _apply_model_options(last, model)
        mtp = get_gpt_mtp_block_spec(config, last, use_transformer_engine=True, vp_stage=vp_stage)
    return block, mtp


def _apply_model_options(layer: ModuleSpec, model: ModelConfig) -> None:
    """Change what upstream has no option for in the spec of a layer with Transformer Engine's modules."""
    attention_modules(model).change_te_spec(layer.submodules.self_attention, model)
    set_router(layer.submodules.mlp, model)
