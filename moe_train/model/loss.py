"""Cross entropy of the `local` backend on a CPU: a few rows at a time, which stay in the cache."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state as ps
from torch import Tensor

_BLOCK_BYTES = 1 << 20


class CrossEntropy(torch.autograd.Function):
    """-log softmax(logits)[label] of each row, and its gradient: logits [t, v], labels [t] -> fp32 [t]."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        losses = logits.new_empty(len(labels), dtype=torch.float32)
        wanted = ctx.needs_input_grad[0]
        grad = torch.empty_like(logits) if wanted else None
        rows = max(1, _BLOCK_BYTES // (4 * logits.size(1)))
        for start in range(0, len(labels), rows):
            part = slice(start, start + rows)
            index = labels[part].unsqueeze(1)
            log_probs = torch.log_softmax(logits[part], dim=-1, dtype=torch.float32)
            losses[part] = -log_probs.gather(1, index).squeeze(1)
            if grad is not None:
                softmax = log_probs.exp_()
                grad[part] = softmax.scatter_add_(1, index, -torch.ones_like(index, dtype=torch.float32))
        ctx.save_for_backward(grad)  # so that whoever counts what a step keeps sees it
        return losses

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor, None]:
        (grad,) = ctx.saved_tensors
        return grad.mul_(grad_losses.unsqueeze(1)), None


def use_in(model: Any) -> None:
    """Have a GPT model use this loss where every rank has the whole vocabulary and a CPU computes.

    Upstream's (tensor_parallel/cross_entropy.py) passes eight times over fp32 logits: a sixth of a small model's step.
    """
    upstream = model.compute_language_model_loss

    def loss(labels: Tensor, logits: Tensor) -> Tensor:
        """labels [b, s] and logits [s, b, v] -> [b, s]."""
        if logits.device.type != "cpu" or ps.get_tensor_model_parallel_world_size() > 1:
            result: Tensor = upstream(labels, logits)
            return result
        rows = labels.t().reshape(-1)
        losses: Tensor = CrossEntropy.apply(logits.flatten(0, 1), rows)
        return losses.view(logits.shape[:2]).t().contiguous()

    model.compute_language_model_loss = loss
