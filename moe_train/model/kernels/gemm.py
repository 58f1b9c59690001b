"""GEMMs of the `local` backend, and the linear layers made of them.

On a CPU upstream's linear layers reach one library for each precision. Here the fastest kernel of this processor runs
(`cpu_gemm.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import tensor_parallel
from torch import Tensor

from moe_train.model.kernels import cpu_gemm

Counts = Sequence[int] | None


def matmul(a: Tensor, b: Tensor, counts: Counts = None) -> Tensor:
    """a b: [t, k] x [k, n] -> [t, n], or grouped with `counts`: b [groups, k, n].

    Not differentiable: for use in `autograd.Function`s.
    """
    if counts is not None:
        return grouped_matmul(a, b, counts)
    return cpu_gemm.matmul(a, b) if a.device.type == "cpu" else torch.mm(a, b)


def matmul_few_rows(a: Tensor, b: Tensor) -> Tensor:
    """a b: [t, k] x [k, n] -> [t, n], also quick for few rows and a small `b`. Not differentiable."""
    return cpu_gemm.matmul_few_rows(a, b) if a.device.type == "cpu" else torch.mm(a, b)


def matmul_tn(a: Tensor, b: Tensor, counts: Counts = None) -> Tensor:
    """a^T b: [t, m] and [t, n] -> [m, n], or grouped with `counts`: [groups, m, n]. Not differentiable."""
    if counts is not None:
        return grouped_matmul_tn(a, b, counts)
    return cpu_gemm.matmul_tn(a, b) if a.device.type == "cpu" else torch.mm(a.t(), b)


def grouped_matmul(a: Tensor, b: Tensor, counts: Sequence[int]) -> Tensor:
    """Rows of `a` [t, k] in groups of `counts` rows, each times its matrix of `b` [groups, k, n]: [t, n]."""
    if a.device.type == "cpu":
        return cpu_gemm.grouped_matmul(a, b, counts)
    return cpu_gemm.torch_grouped_matmul(a, b, counts)


def grouped_matmul_tn(a: Tensor, b: Tensor, counts: Sequence[int]) -> Tensor:
    """a^T b of each group of rows: `a` [t, m] and `b` [t, n] -> [groups, m, n]; zero for a group without rows."""
    if a.device.type == "cpu":
        return cpu_gemm.grouped_matmul_tn(a, b, counts)
    return cpu_gemm.torch_grouped_matmul_tn(a, b, counts)


class LinearKernel:
    """The three GEMMs of a linear layer with x [t, in] and weight [out, in].

    With `counts` they are grouped: rows of x in groups of `counts`, and weight [groups, out, in]. A subclass implements
    another number format (model/fp8/linear.py).
    """

    def fprop(self, x: Tensor, weight: Tensor, counts: Counts, training: bool) -> Tensor:
        """The output [t, out].

        Args:
            training: whether a backward pass follows, so that statistics of the tensors count.
        """
        return matmul(x, weight.mT, counts)

    def dgrad(self, grad: Tensor, weight: Tensor, counts: Counts) -> Tensor:
        """Gradient of x [t, in], from that of the output [t, out]."""
        return matmul(grad, weight, counts)

    def wgrad(self, grad: Tensor, x: Tensor, counts: Counts) -> Tensor:
        """wgrad: gradient with respect to the weight, summed over rows, from that of the output [t, out]."""
        return matmul_tn(grad, x, counts)

    def backward(self, grad: Tensor, x: Tensor, weight: Tensor, counts: Counts) -> tuple[Tensor, Tensor]:
        """dgrad and wgrad. A subclass overrides it to share work between them."""
        return self.dgrad(grad, weight, counts), self.wgrad(grad, x, counts)


HIGH_PRECISION = LinearKernel()


class GroupedLinear(torch.autograd.Function):
    """Rows in groups, each group times its own weight: x [t, in], weight [groups, out, in] -> [t, out]."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        counts: Sequence[int],
        kernel: LinearKernel = HIGH_PRECISION,
        training: bool = False,
    ) -> Tensor:
        """`counts` is the number of rows of each group; they add up to t."""
        ctx.save_for_backward(x, weight)
        ctx.counts, ctx.kernel, ctx.parameter = counts, kernel, weight
        return kernel.fprop(x, weight, counts, training)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        if ctx.kernel is HIGH_PRECISION and accumulates_into_main_grad(ctx.parameter):
            rows = zip(ctx.parameter.main_grad, grad.split(list(ctx.counts)), x.split(list(ctx.counts)), strict=True)
            for main_grad, grad_rows, x_rows in rows:
                main_grad.addmm_(grad_rows.t(), x_rows)
            return ctx.kernel.dgrad(grad, weight, ctx.counts), _already_added(ctx.parameter), None, None, None
        return *ctx.kernel.backward(grad, x, weight, ctx.counts), None, None, None


class _Linear(torch.autograd.Function):
    """x [s * b, in] and weight [out, in] -> [s * b, out], with the collectives of tensor parallelism.

    Args:
        gather_group: ranks over which the sequence is all-gathered first (sequence parallelism), or None.
        reduce_group: ranks over which the gradient of x is all-reduced, or None.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, gather_group: Any, reduce_group: Any, kernel: LinearKernel, training: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.gather_group, ctx.reduce_group, ctx.kernel, ctx.parameter = gather_group, reduce_group, kernel, weight
        return kernel.fprop(_gathered(x, gather_group), weight, None, training)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        whole_x = _gathered(x, ctx.gather_group)
        if ctx.kernel is HIGH_PRECISION and accumulates_into_main_grad(ctx.parameter):
            ctx.parameter.main_grad.addmm_(grad.t(), whole_x)
            grad_x, grad_weight = ctx.kernel.dgrad(grad, weight, None), _already_added(ctx.parameter)
        else:
            grad_x, grad_weight = ctx.kernel.backward(grad, whole_x, weight, None)
        if ctx.gather_group is not None:
            part = torch.empty_like(x)
            dist.reduce_scatter_tensor(part, grad_x, group=ctx.gather_group)
            grad_x = part
        elif ctx.reduce_group is not None:
            dist.all_reduce(grad_x, group=ctx.reduce_group)
        return grad_x, grad_weight, None, None, None, None


def accumulates_into_main_grad(weight: Tensor) -> bool:
    """Whether the GEMM of the weight gradient can add to the gradient buffer of Megatron-Core's DDP itself.

    That saves a separate gradient tensor and two passes over memory. Upstream does it with a CUDA extension of apex
    (`gradient_accumulation_fusion`, tensor_parallel/layers.py). Here it needs a buffer in the precision of the weight,
    and a weight that the embedding does not share: the embedding's gradient comes the usual way.
    """
    main_grad = getattr(weight, "main_grad", None)
    if main_grad is None or weight.device.type != "cpu" or main_grad.dtype is not weight.dtype:
        return False
    shared = any(getattr(weight, name, False) for name in ("shared", "shared_embedding", "zero_out_wgrad"))
    return not shared and weight.dtype is torch.float32 and hasattr(weight, "grad_added_to_main_grad")


def _already_added(weight: Any) -> Tensor:
    """Tell DDP's hook that the gradient is in its buffer, and give autograd a tensor so that it calls the hook."""
    weight.grad_added_to_main_grad = True
    return torch.empty_like(weight)


def _gathered(x: Tensor, group: Any) -> Tensor:
    if group is None:
        return x
    whole = x.new_empty(x.size(0) * group.size(), *x.shape[1:])
    dist.all_gather_into_tensor(whole, x.contiguous(), group=group)
    return whole


def linear(x: Tensor, weight: Tensor, kernel: LinearKernel = HIGH_PRECISION) -> Tensor:
    """[..., in] -> [..., out] without tensor parallelism."""
    if x.device.type != "cpu" and kernel is HIGH_PRECISION:
        return F.linear(x, weight)
    return _linear(x, weight, None, None, kernel)


def _linear(x: Tensor, weight: Tensor, gather_group: Any, reduce_group: Any, kernel: LinearKernel) -> Tensor:
    # Views are made out here: autograd forbids changing a view that a Function returns, as upstream's loss does.
    rows: Tensor = _Linear.apply(x.flatten(0, -2), weight, gather_group, reduce_group, kernel, torch.is_grad_enabled())
    return rows.view(-1, *x.shape[1:-1], weight.size(0))


def _forward_impl(
    upstream: Callable[..., Tensor],
    x: Tensor,
    weight: Tensor,
    options: dict[str, Any],
    kernel: LinearKernel = HIGH_PRECISION,
) -> Tensor:
    """The GEMM of upstream's parallel layers (tensor_parallel/layers.py), with the kernels of this file on the CPU.

    `upstream` handles the rest: other devices, biases, frozen weights.
    """
    bias = options.get("bias")
    special = bias is not None or options.get("grad_output_buffer") is not None
    if kernel is HIGH_PRECISION and (x.device.type != "cpu" or special or not weight.requires_grad):
        return upstream(input=x, weight=weight, **options)
    group = options["tp_group"] if options["tp_group"] is not None and options["tp_group"].size() > 1 else None
    gather_group, reduce_group = (group if options[name] else None for name in ("sequence_parallel", "allreduce_dgrad"))
    y = _linear(x, weight, gather_group, reduce_group, kernel)
    return y if bias is None else y + bias


class ColumnParallelLinear(tensor_parallel.ColumnParallelLinear):
    """Weight split by rows (output features) over tensor-parallel ranks."""

    kernel = HIGH_PRECISION

    def _forward_impl(self, input: Tensor, weight: Tensor, **options: Any) -> Tensor:
        return _forward_impl(super()._forward_impl, input, weight, options, self.kernel)


class RowParallelLinear(tensor_parallel.RowParallelLinear):
    """Weight split by columns (input features) over tensor-parallel ranks."""

    kernel = HIGH_PRECISION

    def _forward_impl(self, input: Tensor, weight: Tensor, **options: Any) -> Tensor:
        return _forward_impl(super()._forward_impl, input, weight, options, self.kernel)


def replace_forward(layer: Any) -> None:
    """Have a layer that upstream builds itself (the LM head, in models/gpt/gpt_model.py) use these kernels."""
    upstream = layer._forward_impl

    def forward(input: Tensor, weight: Tensor, **options: Any) -> Tensor:
        return _forward_impl(upstream, input, weight, options)

    layer._forward_impl = forward
