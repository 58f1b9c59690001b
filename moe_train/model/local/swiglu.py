"""SwiGLU of the `local` backend: silu(gate) * up, where one tensor holds gate and up."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SwiGLU(nn.Module):
    """The activation of dense feed-forward layers and shared experts on a CPU: [..., 2n] -> [..., n].

    Megatron-Core takes it where it takes Transformer Engine's activations (`use_te_activation_func`). Upstream's own
    path keeps three tensors for the backward pass and joins two gradients. This one keeps its input alone.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()

    def forward(self, gate_and_up: Tensor) -> Tensor:
        result: Tensor = _SwiGLU.apply(gate_and_up)
        return result

    @staticmethod
    def compute(gate_and_up: Tensor) -> Tensor:
        """[..., 2n] -> [..., n], without a gradient."""
        gate, up = gate_and_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Nothing: it has no weights. Upstream's MLP asks every module in it."""
        return {}


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_and_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_and_up)
        return SwiGLU.compute(gate_and_up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_and_up,) = ctx.saved_tensors
        gate, up = gate_and_up.chunk(2, dim=-1)
        return _join_gradients(grad * up, grad, F.silu(gate), gate_and_up)


class WeightedSwiGLU(torch.autograd.Function):
    """silu(gate) * up * probability: [t, 2n], [t] -> [t, n], in the precision of the probabilities (fp32)."""

    @staticmethod
    def forward(ctx: Any, gate_and_up: Tensor, probs: Tensor) -> Tensor:
        ctx.save_for_backward(gate_and_up, probs)
        return WeightedSwiGLU.compute(gate_and_up, probs)

    @staticmethod
    def compute(gate_and_up: Tensor, probs: Tensor) -> Tensor:
        """[t, 2n], [t] -> [t, n], without a gradient."""
        gate, up = gate_and_up.chunk(2, dim=-1)
        return (F.silu(gate).mul_(up) * probs.unsqueeze(-1)).to(gate_and_up.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate_and_up, probs = ctx.saved_tensors
        gate, up = gate_and_up.chunk(2, dim=-1)
        activated = F.silu(gate)
        grad_probs = torch.linalg.vecdot(activated * up, grad)
        weighted = (grad * probs.unsqueeze(-1)).to(grad.dtype)
        result = _join_gradients(weighted * up, weighted, activated, gate_and_up)
        return result, grad_probs.to(probs.dtype)


def _join_gradients(grad_activated: Tensor, grad_scaled: Tensor, activated: Tensor, gate_and_up: Tensor) -> Tensor:
    """Gradient of gate and up in one tensor [..., 2n], from that of silu(gate) and from what multiplies it for up."""
    gate = gate_and_up.chunk(2, dim=-1)[0]
    result = torch.empty_like(gate_and_up)
    grad_gate, grad_up = result.chunk(2, dim=-1)
    torch.mul(grad_scaled, activated, out=grad_up)
    torch.ops.aten.silu_backward.grad_input(grad_activated, gate, grad_input=grad_gate)
    return result
