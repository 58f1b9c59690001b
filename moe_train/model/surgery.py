"""Every change that is made in place to a model that Megatron-Core has built, in order, with its condition and reason.

Only what Megatron-Core has no extension point for is here. Its module specs give a model other linear layers (FP8),
norms, attention and routers (specs.py); patches of upstream's functions are in parallel/runtime. After this list DDP
(optim/optimizer.py) wraps the chunks, and measurements add forward hooks (telemetry/model_metrics.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from moe_train.config.model import ModelConfig
from moe_train.config.schema import Config
from moe_train.model.init import initialise
from moe_train.model.kernels import gemm
from moe_train.model.local import dispatch, loss, offload
from moe_train.model.precision import in_training_precision


@dataclass(frozen=True)
class Target:
    """The model chunk that is changed."""

    cfg: Config
    config: TransformerConfig
    local: bool
    """Whether it is of the `local` backend."""
    post: bool
    """Whether it has the output layer and the loss."""
    weights: bool
    """Whether its weights are to be used; else it only shows its shapes."""


@dataclass(frozen=True)
class Change:
    """One change of a chunk."""

    name: str
    why: str
    when: Callable[[Target], bool]
    apply: Callable[[Any, Target], nn.Module | None]
    """Changes the chunk; returns a module that replaces it, or None."""


def _mark_expert_parameters(chunk: nn.Module, target: Target) -> None:
    for name, parameter in chunk.named_parameters():
        if ".experts." in name:
            parameter.allreduce = False  # type: ignore[attr-defined]


def set_latent_norm_epsilon(chunk: nn.Module, model: ModelConfig) -> None:
    """Give the latent norms of mla the epsilon of `model`.

    They are modules (`local`) or fused into the projections that follow them (Transformer Engine).

    Raises:
        RuntimeError: a norm does not show its epsilon, as in an unknown version of Transformer Engine.
    """
    for module in chunk.modules():
        if isinstance(module, MLASelfAttention):
            names = ("q_layernorm", "linear_q_up_proj", "kv_layernorm", "linear_kv_up_proj")
            candidates: list[Any] = [getattr(module, name, None) for name in names]
            norms = [norm for norm in candidates if hasattr(norm, "eps")]
            if len(norms) != (2 if model.q_lora_rank else 1):
                raise RuntimeError(f"{type(module).__name__} has {len(norms)} latent norms that know their epsilon")
            for norm in norms:
                norm.eps = model.latent_norm_epsilon


def _move_shared_expert_gates(chunk: nn.Module, target: Target) -> None:
    for module in chunk.modules():
        gate = getattr(module, "gate_weight", None) if isinstance(module, SharedExpertMLP) else None
        if gate is not None:
            moved: Any = nn.Parameter(torch.empty_like(gate, device=torch.cuda.current_device()).copy_(gate))
            moved.sequence_parallel = target.config.sequence_parallel
            module.gate_weight = moved


def _use_own_dispatchers(chunk: nn.Module, target: Target) -> None:
    dispatch.replace_dispatchers(chunk)


def _exclude_padding_from_loss(chunk: Any, target: Target) -> None:
    loss.replace_loss(chunk, target.cfg.model.vocab_size, own=target.local)


def _use_own_gemm_in_head(chunk: Any, target: Target) -> None:
    gemm.replace_forward(chunk.output_layer)


def _offload_activations(chunk: Any, target: Target) -> None:
    recompute = target.cfg.recompute
    offload.wrap_forward(chunk, recompute.offload, Path(target.cfg.run_dir), recompute.offload_min_bytes)


def _cast(chunk: nn.Module, target: Target) -> nn.Module:
    return in_training_precision(chunk, target.config)


def _draw_weights(chunk: nn.Module, target: Target) -> None:
    initialise([chunk], target.cfg.model, target.cfg.seed)


CHANGES = (
    Change(
        "mark expert parameters",
        "Expert gradients are to be reduced over the ranks that hold the same expert. Upstream says so only where "
        "ep > 1 (tensor_parallel/layers.py, `allreduce`). With ep=1 and etp < tp the tensor-parallel ranks hold the "
        "same experts and see other tokens, yet their gradients would never be added up.",
        lambda target: target.config.expert_tensor_parallel_size != target.config.tensor_model_parallel_size,
        _mark_expert_parameters,
    ),
    Change(
        "epsilon of latent norms",
        "The latent norms of mla have an epsilon of their own, which upstream has no option for.",
        lambda target: target.cfg.model.latent_norm_epsilon is not None,
        lambda chunk, target: set_latent_norm_epsilon(chunk, target.cfg.model),
    ),
    Change(
        "shared-expert gates on the device",
        "Upstream makes the gates of shared experts on the CPU (transformer/moe/shared_experts.py).",
        lambda target: target.cfg.model.shared_expert_gate,
        _move_shared_expert_gates,
    ),
    Change(
        "token dispatchers",
        "MoE layers make their dispatcher themselves. Ours counts the bytes that leave a rank, and can send FP8.",
        lambda target: target.local and target.cfg.model.is_moe,
        _use_own_dispatchers,
    ),
    Change(
        "loss without vocabulary padding",
        "Upstream's loss gives a probability to the rows that pad the vocabulary. On a CPU it is slow, too.",
        lambda target: target.post,
        _exclude_padding_from_loss,
    ),
    Change(
        "GEMM of the output layer",
        "GPTModel makes its output layer itself, without a spec (models/gpt/gpt_model.py).",
        lambda target: target.local and target.post,
        _use_own_gemm_in_head,
    ),
    Change(
        "activation offloading",
        "Upstream offloads to a GPU's host only. It wraps the forward pass, so it follows what changes that pass.",
        lambda target: target.local and target.cfg.recompute.offload != "none",
        _offload_activations,
    ),
    Change(
        "training precision",
        "Float16Module casts buffers too, in which routers count; they keep their dtype here.",
        lambda target: target.weights and (target.config.bf16 or target.config.fp16),
        _cast,
    ),
    Change(
        "initial weights",
        "Upstream's depend on the layout of ranks. They are drawn last, in the training precision.",
        lambda target: target.weights,
        _draw_weights,
    ),
)
"""In the order in which they are applied."""


def changes_of(target: Target) -> list[Change]:
    """Those that a chunk gets."""
    return [change for change in CHANGES if change.when(target)]


def operate(chunk: nn.Module, target: Target) -> nn.Module:
    """Apply the changes to a chunk that was just built, and return the chunk or its wrapper."""
    for change in changes_of(target):
        chunk = change.apply(chunk, target) or chunk
    return chunk
