"""ModelConfig -> Megatron-Core GPT model. The one place that knows Megatron-Core's model API."""

from __future__ import annotations

from copy import copy
from importlib.metadata import version
from typing import Any

import torch
from megatron.core import parallel_state as ps
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from packaging.version import Version
from torch import nn

from moe_train.config.model import ModelConfig
from moe_train.config.recompute import of_chunk
from moe_train.config.resolve import ResolvedConfig
from moe_train.config.rules.precision import high_precision_layers
from moe_train.config.schema import Config, RecomputeConfig
from moe_train.model import surgery
from moe_train.model.attention_modules import attention_modules
from moe_train.model.local.router import scores_groups_by_best
from moe_train.model.precision import dtype_options, emulated_recipe, low_precision_options
from moe_train.model.specs import LocalBackend, local_specs, te_specs
from parallel import pipeline
from parallel.architecture.attention import attention_kind
from parallel.layout import ParallelLayout


def transformer_config(resolved: ResolvedConfig, stage: int = 0) -> TransformerConfig:
    """Everything Megatron-Core wants to know, for pipeline stage `stage`."""
    cfg, backend = resolved.cfg, resolved.backend
    attention = attention_modules(cfg.model)
    options = {
        **_backbone(cfg.model),
        **attention.options(cfg.model),
        **(_experts(resolved) if cfg.model.is_moe else {}),
        **_parallel(resolved),
        **_numbers(cfg),
        **_recompute(of_chunk(cfg.recompute, stage)),
        **_offload(cfg.recompute, backend),
        **(low_precision_options(cfg.precision) if backend == "te" else {}),
        **_fusions(resolved),
    }
    config = attention.config_class(**options)
    for name, value in _yarn_of_the_model(cfg.model).items():
        setattr(config, name, value)
    return config


def _backbone(model: ModelConfig) -> dict[str, Any]:
    mtp = {"mtp_num_layers": model.mtp_num_layers, "mtp_loss_scaling_factor": model.mtp_loss_coeff}
    return {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "normalization": "RMSNorm",
        "layernorm_epsilon": model.norm_epsilon,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "init_method_std": model.init_std,
        **(mtp if model.mtp_num_layers else {}),
    }


def _model_has_yarn(model: ModelConfig) -> bool:
    """Whether GPTModel computes the rotary angles of YaRN, and not each attention its own."""
    return attention_kind(model).shared_rope and model.rope_type == "yarn"


def _yarn_of_the_model(model: ModelConfig) -> dict[str, Any]:
    """Upstream's GPTModel reads these from the config, which has no such fields (models/gpt/gpt_model.py)."""
    if not _model_has_yarn(model):
        return {}
    return {
        "yarn_rotary_scaling_factor": model.yarn_factor,
        "yarn_original_max_position_embeddings": model.yarn_original_max_position,
        "yarn_beta_fast": model.yarn_beta_fast,
        "yarn_beta_slow": model.yarn_beta_slow,
        "yarn_mscale": model.yarn_mscale,
        "yarn_mscale_all_dim": model.yarn_mscale_all_dim,
        "yarn_correction_range_round_to_int": True,
    }


def _experts(resolved: ResolvedConfig) -> dict[str, Any]:
    model, parallel, layout = resolved.cfg.model, resolved.cfg.parallel, resolved.layout
    # Before 0.19 upstream counts these losses 1 / (tp x cp) too little when the loss is a sum over tokens: each rank
    # multiplies by its own tokens, not by those of its tensor- and context-parallel peers (transformer/moe/router.py).
    scale = layout.tp * layout.cp if Version(version("megatron-core")) < Version("0.19") else 1
    groups = {"moe_router_num_groups": model.router_num_groups, "moe_router_group_topk": model.router_topk_groups}
    return {
        "num_moe_experts": model.num_experts,
        "moe_layer_freq": model.moe_layer_pattern,
        "moe_ffn_hidden_size": model.moe_ffn_hidden_size,
        "moe_shared_expert_intermediate_size": model.shared_expert_width or None,
        "moe_shared_expert_gate": model.shared_expert_gate,
        "moe_shared_expert_overlap": parallel.shared_expert_overlap,
        "moe_router_topk": model.topk,
        "moe_router_score_function": model.router_score,
        "moe_router_pre_softmax": model.router_pre_softmax,
        "moe_router_enable_expert_bias": model.router_bias,
        "moe_router_bias_update_rate": model.router_bias_update_rate,
        "moe_router_topk_scaling_factor": model.router_scaling_factor if model.router_scaling_factor != 1.0 else None,
        "moe_router_dtype": model.router_dtype,
        "moe_router_load_balancing_type": list(model.balance_losses) or "none",
        "moe_aux_loss_coeff": [scale * coeff for coeff in model.balance_loss_coeffs] or 0.0,
        "moe_z_loss_coeff": scale * model.z_loss_coeff or None,
        "moe_expert_capacity_factor": model.capacity_factor,
        "moe_pad_expert_input_to_capacity": model.pad_to_capacity,
        "moe_token_drop_policy": model.token_drop_policy,
        "moe_token_dispatcher_type": parallel.dispatcher,
        "moe_grouped_gemm": resolved.grouped,
        **(groups if model.router_num_groups else {}),
    }


def _parallel(resolved: ResolvedConfig) -> dict[str, Any]:
    layout = resolved.layout
    return {
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.vpp if layout.vpp > 1 else None,
        "pipeline_model_parallel_layout": pipeline_layout(resolved.cfg, layout),
        "context_parallel_size": layout.cp,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.etp,
        "sequence_parallel": resolved.sequence_parallel,
        "overlap_p2p_comm": resolved.overlap_p2p,
        "batch_p2p_comm": not resolved.overlap_p2p,
        # With overlapped messages gloo still reads the output that upstream would free: gradients come out wrong.
        "deallocate_pipeline_outputs": resolved.runtime == "cuda",
        "variable_seq_lengths": False,
    }


def _numbers(cfg: Config) -> dict[str, Any]:
    return {
        **dtype_options(cfg.precision),
        # The loss is a sum over tokens divided once by their number in the global batch: no layout changes it.
        "calculate_per_token_loss": True,
        "deterministic_mode": cfg.train.deterministic,
        "qk_clip": cfg.optimizer.qk_clip_threshold is not None,  # core attention then records its largest logits
        "use_cpu_initialization": False,
        "perform_initialization": True,  # also marks which parameters are split over tensor-parallel ranks
    }


def _recompute(recompute: RecomputeConfig) -> dict[str, Any]:
    """Activations to compute again in the backward pass (transformer/transformer_config.py upstream)."""
    if recompute.mode == "full":
        method, layers = recompute.method, recompute.num_layers
        return {"recompute_granularity": "full", "recompute_method": method, "recompute_num_layers": layers}
    if recompute.mode == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": list(recompute.modules)}
    return {}


def _offload(recompute: RecomputeConfig, backend: str) -> dict[str, Any]:
    """Activations that Megatron-Core moves to the host's memory; those of the `local` backend are offload.py's."""
    if recompute.offload == "none" or backend != "te":
        return {}
    return {
        "fine_grained_activation_offloading": True,
        "offload_modules": list(recompute.offload_modules),
        "min_offloaded_tensor_size": recompute.offload_min_bytes,
    }


def _fusions(resolved: ResolvedConfig) -> dict[str, Any]:
    """Fused paths that Megatron-Core's guide recommends (core/transformer/moe/README.md)."""
    cfg, backend, runtime, fused = resolved.cfg, resolved.backend, resolved.runtime, resolved.fused
    te = fused and backend == "te"
    return {
        "bias_activation_fusion": fused,
        "use_te_activation_func": backend == "local" and runtime == "cpu" and not fused,  # ours: specs.LocalBackend
        "bias_dropout_fusion": fused,
        "masked_softmax_fusion": fused,
        "apply_rope_fusion": te and attention_kind(cfg.model).fused_rope,
        # Upstream's own kernel ("native"), which its guide recommends. It rounds gradients to bf16 for every
        # dtype of the logits (fusions/fused_cross_entropy.py).
        "cross_entropy_loss_fusion": fused and cfg.precision.dtype == "bf16",
        "moe_permute_fusion": te and cfg.model.is_moe,
        # The fused kernel adds up a group's best experts and ignores router_group_score.
        "moe_router_fusion": te and cfg.model.is_moe and not scores_groups_by_best(cfg.model),
        # The output head accumulates with apex's kernel, also with Transformer Engine (tensor_parallel/layers.py).
        "gradient_accumulation_fusion": cfg.backend.apex,
    }


def pipeline_layout(cfg: Config, layout: ParallelLayout) -> str | None:
    """Layers of each pipeline stage in Megatron-Core's notation; None without a pipeline."""
    if layout.pp == 1:
        return None
    model = cfg.model
    return cfg.parallel.pipeline_layout or pipeline.balanced_layout(
        model.num_layers, layout.pp, layout.vpp, model.mtp_num_layers
    )


def build_chunk(
    cfg: Config, config: TransformerConfig, backend: str, *, pre: bool, post: bool, vp_stage: int | None
) -> GPTModel:
    """One model chunk of this rank: `pre` has the embedding, `post` the head and loss. Process groups must exist."""
    model = cfg.model
    if backend == "te":
        block, mtp = te_specs(config, model, vp_stage)
    else:
        provider = LocalBackend(cfg.backend.apex, emulated_recipe(cfg.precision))
        bf16_layers = high_precision_layers(cfg.precision, model.num_layers)
        block, mtp = local_specs(config, model, provider, vp_stage, bf16_layers)
    return GPTModel(
        config=config,
        transformer_layer_spec=block,
        mtp_block_spec=mtp,
        vocab_size=model.padded_vocab_size,
        max_sequence_length=model.max_position_embeddings,
        pre_process=pre,
        post_process=post,
        share_embeddings_and_output_weights=model.tie_embeddings,
        position_embedding_type="yarn" if _model_has_yarn(model) else "rope",
        rotary_percent=model.rotary_percent,
        rotary_base=model.rope_base,
        rope_scaling=model.rope_type == "llama3",
        rope_scaling_factor=model.llama3_factor,
        vp_stage=vp_stage,
    )


def build(cfg: Config, config: TransformerConfig, backend: str, vpp: int, *, weights: bool = True) -> list[nn.Module]:
    """The `vpp` chunks of this rank, first to last, on the current device. Process groups must exist.

    Args:
        weights: make initial weights in the training precision; False leaves upstream's, for shapes only.
    """
    chunks = []
    for i in range(vpp):
        stage = i if vpp > 1 else None
        pre = ps.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage)
        post = ps.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage)
        own_config = _config_of(cfg, config, i)
        chunk = build_chunk(cfg, own_config, backend, pre=pre, post=post, vp_stage=stage)
        target = surgery.Target(cfg, own_config, local=backend == "local", post=post, weights=weights)
        chunks.append(surgery.operate(chunk, target))
    return chunks


def _config_of(cfg: Config, config: TransformerConfig, chunk: int) -> TransformerConfig:
    """`config` with what the `chunk`-th chunk of this rank recomputes. The first keeps the object itself: there the
    pipeline schedule looks for what the optimizer and DDP add later (pipeline_parallel/schedules.py upstream)."""
    if chunk == 0 or not cfg.recompute.stages:
        return config
    own = of_chunk(cfg.recompute, chunk * config.pipeline_model_parallel_size + ps.get_pipeline_model_parallel_rank())
    cleared: dict[str, Any] = {"recompute_granularity": None, "recompute_method": None, "recompute_num_layers": None}
    config = copy(config)
    for name, value in {**cleared, "recompute_modules": ["core_attn"], **_recompute(own)}.items():
        setattr(config, name, value)
    return config
