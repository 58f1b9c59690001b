"""AdamW or Muon over Megatron-Core's distributed optimizers."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state as ps
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from moe_train.config.optimizer import MUON
from moe_train.config.resolve import ResolvedConfig
from moe_train.config.schema import Config
from moe_train.model.precision import DTYPES
from moe_train.optim.groups import overrides
from moe_train.optim.moments import AdamWithBf16Moments
from parallel.fp8_recipes import RECIPES


def data_parallel(
    chunks: list[nn.Module], config: TransformerConfig, resolved: ResolvedConfig
) -> list[DistributedDataParallel]:
    """Wrap each model chunk so that gradients collect in one buffer and are reduced over data-parallel ranks."""
    cfg, parallel = resolved.cfg, resolved.cfg.parallel
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=cfg.precision.grad_reduce_fp32,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        use_distributed_optimizer=_distributed(resolved),
        fp8_param_gather=cfg.precision.fp8_param_gather,
        reuse_grad_buf_for_mxfp8_param_ag=_mxfp8_parameters(cfg),
    )
    wrapped = []
    for i, chunk in enumerate(chunks):
        # Upstream buckets only the first chunk: the others' reductions can't overlap with anything later.
        wrapped.append(DistributedDataParallel(config, ddp_config, chunk, disable_bucketing=i > 0))
    config.finalize_model_grads_func = finalize_model_grads
    if parallel.overlap_grad_reduce:
        hooks = [chunk.no_sync for chunk in wrapped]
        config.no_sync_func = hooks if len(hooks) > 1 else hooks[0]
    return wrapped


def _mxfp8_parameters(cfg: Config) -> bool:
    """Whether weights are kept in MXFP8, which upstream then gathers through the gradient buffer."""
    precision = cfg.precision
    return precision.fp8_param_gather and precision.fp8 is not None and RECIPES[precision.fp8].gathers_high_precision


def _distributed(resolved: ResolvedConfig) -> bool:
    """Whether to shard optimizer state with the buffers of gradients. Over one rank there is nothing to shard, only
    copies of all weights and gradients to save; checkpoints are the same."""
    shards = max(ps.get_data_parallel_world_size(with_context_parallel=True), ps.get_expert_data_parallel_world_size())
    cfg = resolved.cfg
    needed = cfg.parallel.overlap_param_gather or cfg.precision.fp8_param_gather or _moments_of_te(resolved)
    return cfg.parallel.distributed_optimizer and (shards > 1 or needed) and cfg.optimizer.name != MUON


def _layer_wise(resolved: ResolvedConfig) -> bool:
    """Whether data-parallel ranks share out parameters, each with its state: Muon needs whole matrices."""
    shards = ps.get_data_parallel_world_size(with_context_parallel=True)
    return resolved.cfg.parallel.distributed_optimizer and shards > 1 and resolved.cfg.optimizer.name == MUON


def _moments_of_te(resolved: ResolvedConfig) -> bool:
    """Whether Transformer Engine's optimizer is to keep moments in bf16; on a CPU our own does."""
    return resolved.cfg.precision.moments_dtype == "bf16" and resolved.runtime == "cuda"


def build_optimizer(
    resolved: ResolvedConfig, config: TransformerConfig, chunks: list[DistributedDataParallel]
) -> MegatronOptimizer:
    """AdamW or Muon, with fp32 master weights where weights are 16-bit; `distributed_optimizer` shards its state."""
    cfg = resolved.cfg
    muon, fp32 = cfg.optimizer.name == MUON, cfg.precision.dtype == "fp32"
    options = _options(resolved)
    if muon:
        from moe_train.optim import muon as grouped_muon  # needs a package that is not always installed

        grouped_muon.register()
        options |= grouped_muon.megatron_options(cfg.optimizer, fp32, _layer_wise(resolved))
    settings = OptimizerConfig(**options)
    built = get_megatron_optimizer(settings, chunks, overrides(cfg, settings, chunks), use_gloo_process_groups=False)
    if fp32 and _layer_wise(resolved):
        built = grouped_muon.distribute_fp32(built, settings)
    config.grad_scale_func = built.scale_loss
    if cfg.precision.moments_dtype == "bf16" and not _moments_of_te(resolved):
        _store_moments_in_bf16(built, cfg.seed if cfg.precision.stochastic_rounding else None)
    _fuse(built)
    return built


def _options(resolved: ResolvedConfig) -> dict[str, Any]:
    """Fields of Megatron-Core's OptimizerConfig, for AdamW."""
    cfg, optimizer = resolved.cfg, resolved.cfg.optimizer
    options: dict[str, Any] = {
        "optimizer": "adam",
        "lr": optimizer.lr,
        "min_lr": optimizer.lr * cfg.schedule.min_lr_ratio,
        "weight_decay": optimizer.weight_decay,
        "adam_beta1": optimizer.beta1,
        "adam_beta2": optimizer.beta2,
        "adam_eps": optimizer.eps,
        "clip_grad": optimizer.clip_grad,
        "params_dtype": DTYPES[cfg.precision.dtype],
        "bf16": cfg.precision.dtype == "bf16",
        "fp16": cfg.precision.dtype == "fp16",
        "initial_loss_scale": cfg.precision.initial_loss_scale,
        "use_distributed_optimizer": _distributed(resolved),
        "overlap_param_gather": cfg.parallel.overlap_param_gather,
    }
    if cfg.precision.fp8_param_gather:  # the optimizer then writes weights in FP8
        options["fp8_recipe"] = RECIPES[cfg.precision.fp8 or ""].megatron
        options["reuse_grad_buf_for_mxfp8_param_ag"] = _mxfp8_parameters(cfg)
    if _moments_of_te(resolved):  # upstream's optimizer_config.py
        options["use_precision_aware_optimizer"] = True
        options["exp_avg_dtype"] = options["exp_avg_sq_dtype"] = DTYPES["bf16"]
    return options


def _store_moments_in_bf16(optimizer: MegatronOptimizer, seed: int | None) -> None:
    """Our AdamW over the parameter groups of torch's, which has no such option."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if part.optimizer is not None:
            part.optimizer = AdamWithBf16Moments(part.optimizer.param_groups, seed)


def _fuse(optimizer: MegatronOptimizer) -> None:
    """Use fused AdamW where the optimizer is torch's own (neither Transformer Engine nor apex is installed): it reads
    each parameter once per update. Upstream has no such option (optimizer/__init__.py); torch reads it each step."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(part.optimizer, torch.optim.AdamW):
            for group in part.optimizer.param_groups:
                group["fused"], group["foreach"] = True, False
