"""The update of a step in two halves, so that whether it is applied can be decided once its gradients are known."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32


@torch.no_grad()
def gradient_norm(optimizer: Any) -> float | None:
    """Unscale the gradients and return their global norm before clipping; None where those of fp16 overflowed."""
    if optimizer.prepare_grads():
        return None
    return float(optimizer.get_grad_norm() or 0.0)


@torch.no_grad()
def apply(optimizer: Any, norm: float) -> bool:
    """Clip by `norm` and update the weights: the rest of `step()` of Megatron-Core's optimizers (optimizer.py).

    From 0.19 on upstream can clip parameters with a `grad_norm_group` by themselves, which only the heads that
    `mtp_detach_heads` detaches have; that is not used here.
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        parameters = [] if getattr(part, "is_stub_optimizer", False) else part.get_parameters()
        if parameters and part.config.clip_grad > 0:
            decoupled = part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
            clip_grad_by_total_norm_fp32(parameters, part.config.clip_grad, norm, decoupled)
    return bool(optimizer.step_with_ready_grads())
