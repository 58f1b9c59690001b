"""Matrix products of the `local` backend, and the linear layers made of them.

On a CPU upstream's linear layers reach MKL for fp32, which runs at half the speed of oneDNN on AMD processors (measured
with torch 2.13: 230 against 450 GFLOP/s on two Zen 5 cores). bf16 goes to oneDNN already.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import tensor_parallel
from torch import Tensor

Counts = Sequence[int] | None

_SMALL_GROUP = 48  # rows, on average


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """[m, k] x [k, n] -> [m, n], with the faster library. Not differentiable: for use in `autograd.Function`s."""
    if _onednn(a):
        product: Tensor = torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")
        return product
    return torch.mm(a, b)


def outer(a: Tensor, b: Tensor) -> Tensor:
    """a^T b: [t, m] and [t, n] -> [m, n]. Not differentiable."""
    if _onednn(a) and a.size(1) > b.size(1):  # oneDNN copies its transposed left side: let that be the smaller one
        return matmul(b.t(), a).t().contiguous()
    return matmul(a.t(), b)


def _onednn(a: Tensor) -> bool:
    cpu_fp32 = a.device.type == "cpu" and a.dtype is torch.float32
    return cpu_fp32 and torch.backends.mkldnn.is_available() and a.numel() > 0


def grouped_matmul(a: Tensor, b: Tensor, counts: Sequence[int]) -> Tensor:
    """Rows of `a` [t, k] in groups of `counts` rows, each times its matrix of `b` [groups, k, n]: [t, n].

    On CUDA one kernel. On the CPU torch's own has a loop, too; the one here meets few distinct sizes (`_padded`).
    """
    if a.is_cuda or (not _onednn(a) and _small_groups(a, b, counts)):
        return torch._grouped_mm(a, b, offs=_ends(counts, a.device))
    total, start = a.size(0), 0
    out = a.new_empty(total, b.size(2))
    for count, matrix in zip(counts, b, strict=True):
        end, padded = start + count, _padded(count, total)
        if start + padded <= total:  # rows of the next groups come along; their own turn overwrites what comes out
            _into(a[start : start + padded], matrix, out[start : start + padded])
        else:
            out[start:end] = matmul(a[total - padded :], matrix)[start - total + padded :][:count]
        start = end
    return out


def grouped_outer(a: Tensor, b: Tensor, counts: Sequence[int]) -> Tensor:
    """a^T b of each group of rows: `a` [t, m] and `b` [t, n] -> [groups, m, n]; zero for a group without rows."""
    if a.is_cuda or _small_groups(a, b, counts):
        return torch._grouped_mm(a.t(), b, offs=_ends(counts, a.device))
    total, start = a.size(0), 0
    out = a.new_empty(len(counts), a.size(1), b.size(1))
    for count, result in zip(counts, out, strict=True):
        padded = _padded(count, total)
        first = min(start, total - padded)
        rows = a.new_zeros(padded, a.size(1))  # zeros for the rows of other groups that come along
        rows[start - first :][:count] = a[start : start + count]
        if _onednn(rows):
            result.copy_(outer(rows, b[first : first + padded]))
        else:
            torch.mm(rows.t(), b[first : first + padded], out=result)
        start += count
    return out


def _padded(count: int, total: int) -> int:
    """`count` rounded up by an eighth at most (16 at least), so that few sizes occur: oneDNN compiles a kernel for
    every size that it meets, which takes longer than a small product, and how many tokens an expert gets is always
    new. All rows are there to be read, up to `total`."""
    step = max(16, 1 << max(0, count.bit_length() - 4))
    padded = -(-count // step) * step
    return padded if padded <= total else count


def _small_groups(a: Tensor, b: Tensor, counts: Sequence[int]) -> bool:
    """Whether torch's own loop is the faster one on a CPU (`make bench-step`): groups are so small that starting a
    product takes longer than compiling it. It takes rows of whole 16 bytes only."""
    aligned = all(step == 1 or step * t.element_size() % 16 == 0 for t in (a, b) for step in t.stride())
    return 0 < a.size(0) <= _SMALL_GROUP * len(counts) and aligned


def _ends(counts: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(counts, device=device).cumsum(0, dtype=torch.int32)


def _into(a: Tensor, b: Tensor, out: Tensor) -> None:
    if _onednn(a):
        out.copy_(matmul(a, b))
    else:
        torch.mm(a, b, out=out)


def product(a: Tensor, b: Tensor, counts: Counts) -> Tensor:
    """a b: [t, k] and [k, n], or rows in groups of `counts` and [groups, k, n], -> [t, n]. Not differentiable."""
    return matmul(a, b) if counts is None else grouped_matmul(a, b, counts)


def product_over_rows(a: Tensor, b: Tensor, counts: Counts) -> Tensor:
    """a^T b: [t, m] and [t, n] -> [m, n], or for each group of `counts` rows [groups, m, n]. Not differentiable."""
    return outer(a, b) if counts is None else grouped_outer(a, b, counts)


class Products:
    """The products of a linear layer, x [t, in] and weight [out, in] (a [groups, out, in] of them for rows in groups of
    `counts`). Other number formats override them (fp8_products.py)."""

    def forward(self, x: Tensor, weight: Tensor, counts: Counts, learn: bool) -> Tensor:
        """The output [t, out].

        Args:
            learn: whether a backward pass follows, so that statistics of the tensors count.
        """
        return product(x, weight.mT, counts)

    def backward(self, grad: Tensor, x: Tensor, weight: Tensor, counts: Counts) -> tuple[Tensor, Tensor]:
        """Gradients of x and of the weight, from that of the output [t, out]."""
        return product(grad, weight, counts), product_over_rows(grad, x, counts)


PLAIN = Products()


class GroupedLinear(torch.autograd.Function):
    """Rows in groups, each group times its own weight: x [t, in], weight [groups, out, in] -> [t, out]."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, counts: Sequence[int], products: Products = PLAIN, learn: bool = False
    ) -> Tensor:
        """`counts` is the number of rows of each group; they add up to t."""
        ctx.save_for_backward(x, weight)
        ctx.counts, ctx.products = counts, products
        return products.forward(x, weight, counts, learn)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        return *ctx.products.backward(grad.contiguous(), x, weight, ctx.counts), None, None, None


class _Linear(torch.autograd.Function):
    """x [s * b, in] and weight [out, in] -> [s * b, out], with the messages of tensor parallelism.

    Args:
        gather: the ranks whose parts of the sequence are gathered first (sequence parallelism), or None.
        add_up: the ranks over which the gradient of x is added up, or None.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, gather: Any, add_up: Any, products: Products, learn: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.gather, ctx.add_up, ctx.products = gather, add_up, products
        return products.forward(_gathered(x, gather), weight, None, learn)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_x, grad_weight = ctx.products.backward(grad, _gathered(x, ctx.gather), weight, None)
        if ctx.gather is not None:
            part = torch.empty_like(x)
            dist.reduce_scatter_tensor(part, grad_x, group=ctx.gather)
            grad_x = part
        elif ctx.add_up is not None:
            dist.all_reduce(grad_x, group=ctx.add_up)
        return grad_x, grad_weight, None, None, None, None


def _gathered(x: Tensor, group: Any) -> Tensor:
    if group is None:
        return x
    whole = x.new_empty(x.size(0) * group.size(), *x.shape[1:])
    dist.all_gather_into_tensor(whole, x.contiguous(), group=group)
    return whole


def linear(x: Tensor, weight: Tensor, products: Products = PLAIN) -> Tensor:
    """[..., in] -> [..., out] without tensor parallelism."""
    if x.device.type != "cpu" and products is PLAIN:
        return F.linear(x, weight)
    return _linear(x, weight, None, None, products)


def _linear(x: Tensor, weight: Tensor, gather: Any, add_up: Any, products: Products) -> Tensor:
    # Views are made out here: autograd forbids changing a view that a Function returns, as upstream's loss does.
    rows: Tensor = _Linear.apply(x.flatten(0, -2), weight, gather, add_up, products, torch.is_grad_enabled())
    return rows.view(-1, *x.shape[1:-1], weight.size(0))


def _forward_impl(
    upstream: Callable[..., Tensor], x: Tensor, weight: Tensor, options: dict[str, Any], products: Products = PLAIN
) -> Tensor:
    """What upstream's parallel layers call to multiply (tensor_parallel/layers.py), with the products of this file on
    the CPU. `upstream` does the rest: other devices, biases, weights that are not trained."""
    bias = options.get("bias")
    special = bias is not None or options.get("grad_output_buffer") is not None
    if products is PLAIN and (x.device.type != "cpu" or special or not weight.requires_grad):
        return upstream(input=x, weight=weight, **options)
    group = options["tp_group"] if options["tp_group"] is not None and options["tp_group"].size() > 1 else None
    gather, add_up = (group if options[name] else None for name in ("sequence_parallel", "allreduce_dgrad"))
    y = _linear(x, weight, gather, add_up, products)
    return y if bias is None else y + bias


class ColumnParallelLinear(tensor_parallel.ColumnParallelLinear):
    """Weight split by rows (output features) over tensor-parallel ranks."""

    products = PLAIN

    def _forward_impl(self, input: Tensor, weight: Tensor, **options: Any) -> Tensor:
        return _forward_impl(super()._forward_impl, input, weight, options, self.products)


class RowParallelLinear(tensor_parallel.RowParallelLinear):
    """Weight split by columns (input features) over tensor-parallel ranks."""

    products = PLAIN

    def _forward_impl(self, input: Tensor, weight: Tensor, **options: Any) -> Tensor:
        return _forward_impl(super()._forward_impl, input, weight, options, self.products)


def use_in(layer: Any) -> None:
    """Have a layer that upstream made itself (the output head, in models/gpt/gpt_model.py) use these products."""
    upstream = layer._forward_impl

    def forward(input: Tensor, weight: Tensor, **options: Any) -> Tensor:
        return _forward_impl(upstream, input, weight, options)

    layer._forward_impl = forward
