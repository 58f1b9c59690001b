"""Cross entropy over the tokens of the vocabulary, without the rows that pad it (`ModelConfig.padded_vocab_size`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state as ps
from torch import Tensor

_BLOCK_BYTES = 1 << 20


class CrossEntropy(torch.autograd.Function):
    """-log softmax(logits)[label] over the first `valid` columns, and its gradient, which is zero in the others.

    logits [t, v], labels [t] -> fp32 [t]. A few rows at a time, which stay in the cache of a CPU.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, valid: int) -> Tensor:
        losses = logits.new_empty(len(labels), dtype=torch.float32)
        wanted = ctx.needs_input_grad[0]
        grad = torch.empty_like(logits) if wanted else None
        rows = max(1, _BLOCK_BYTES // (4 * logits.size(1)))
        for start in range(0, len(labels), rows):
            part = slice(start, start + rows)
            index = labels[part].unsqueeze(1)
            log_probs = torch.log_softmax(logits[part, :valid], dim=-1, dtype=torch.float32)
            losses[part] = -log_probs.gather(1, index).squeeze(1)
            if grad is not None:
                softmax = log_probs.exp_()
                grad[part, :valid] = softmax.scatter_add_(1, index, -torch.ones_like(index, dtype=torch.float32))
                grad[part, valid:] = 0
        ctx.save_for_backward(grad)  # as a saved tensor, the memory profiler counts it
        return losses

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = ctx.saved_tensors
        return grad.mul_(grad_losses.unsqueeze(1)), None, None


class LanguageModelLoss:
    """`compute_language_model_loss` of a GPT model, over the first `vocab_size` tokens.

    Args:
        upstream: the method that it replaces.
        own: use `CrossEntropy` where every rank has the whole vocabulary and a CPU computes. Upstream's
            (tensor_parallel/cross_entropy.py) passes eight times over fp32 logits: a sixth of a small model's step.
    """

    def __init__(self, upstream: Callable[[Tensor, Tensor], Tensor], vocab_size: int, own: bool) -> None:
        self._upstream, self._vocab_size, self._own = upstream, vocab_size, own
        self.observe: Callable[[Tensor], object] = lambda losses: None
        """Called with the losses [b, s] of each call, those of multi-token prediction too."""

    def __call__(self, labels: Tensor, logits: Tensor) -> Tensor:
        """labels [b, s] and logits [s, b, v / tp] -> [b, s]."""
        losses = self._losses(labels, logits)
        self.observe(losses)
        return losses

    def _losses(self, labels: Tensor, logits: Tensor) -> Tensor:
        columns = logits.size(-1)
        first = ps.get_tensor_model_parallel_rank() * columns
        valid = min(max(self._vocab_size - first, 0), columns)
        whole = ps.get_tensor_model_parallel_world_size() == 1
        if self._own and whole and logits.device.type == "cpu":
            rows = labels.t().reshape(-1)
            losses: Tensor = CrossEntropy.apply(logits.flatten(0, 1), rows, valid)
            return losses.view(logits.shape[:2]).t().contiguous()
        _exclude(logits, valid)
        return self._upstream(labels, logits)


def replace_loss(model: Any, vocab_size: int, own: bool) -> None:
    """Have a GPT model compute its loss with `LanguageModelLoss`, in multi-token prediction too."""
    model.compute_language_model_loss = LanguageModelLoss(model.compute_language_model_loss, vocab_size, own)


@torch.no_grad()
def _exclude(logits: Tensor, valid: int) -> None:
    """Give the columns of `logits` [..., v / tp] from `valid` on a probability of zero, in place.

    Autograd need not know: a softmax of exactly zero has a gradient of zero. Only these columns are written, where a
    narrower view of the logits would cost a copy of their gradient. The value is finite because a kernel that keeps a
    running maximum would make NaN of a rank that has padding alone.
    """
    if valid < logits.size(-1):
        logits[..., valid:] = torch.finfo(logits.dtype).min
