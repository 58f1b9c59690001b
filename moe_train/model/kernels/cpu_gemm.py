"""GEMM kernels of a CPU. `KERNELS` lists the candidates of each operation, and `use` says which of them run.

Which one is the fastest depends on the processor (docs/performance.md), so `cpu_kernels.py` measures them. No operation
here is differentiable: `gemm.py` calls them in `autograd.Function`s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Counts = Sequence[int]
Kernel = Callable[..., Tensor]
FEW_ROWS = 8
"""Of a group: starting a GEMM for each takes less time than a grouped GEMM."""
SMALL_MATRIX, MKL_MULTIPLICATIONS = 200_000, 2_000_000
"""Elements of a matrix, and multiplications of a GEMM in fp32, up to which MKL is faster than oneDNN, whose calls take
about 13 us longer (two threads on a Zen 4)."""
NATIVE_MULTIPLICATIONS = 150_000
"""Of a GEMM in bf16: calling oneDNN takes about 12 us longer than torch's own kernel, which computes so many in that
time. With one row it is faster for any matrix, up to twice (two threads on a Zen 4)."""
FEW_QUERIES, LONG_KEYS, KEYS_AT_ONCE = 16, 2048, 512
"""With so few queries, MKL takes up to 1.7 times as long for one GEMM with so many keys as for a batch of short ones
(two threads on a Zen 4)."""
SMALL_GROUP_ROWS = 48
"""Up to this many rows a group on average, groups are small: starting a GEMM then takes as long as computing it."""


def onednn_matmul(a: Tensor, b: Tensor) -> Tensor:
    """[m, k] x [k, n] -> [m, n] in fp32 by oneDNN; `torch.mm` takes MKL for fp32."""
    if a.numel() == 0 or not torch.backends.mkldnn.is_available():
        return torch.mm(a, b)
    result: Tensor = torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")
    return result


def torch_matmul_tn(a: Tensor, b: Tensor) -> Tensor:
    """a^T b: [t, m] and [t, n] -> [m, n]."""
    return torch.mm(a.t(), b)


def onednn_matmul_tn(a: Tensor, b: Tensor) -> Tensor:
    """a^T b: [t, m] and [t, n] -> [m, n] in fp32."""
    if a.size(1) > b.size(1):  # oneDNN copies its transposed left operand: let that be the smaller one
        return onednn_matmul(b.t(), a).t().contiguous()
    return onednn_matmul(a.t(), b)


def torch_grouped_matmul(a: Tensor, b: Tensor, counts: Counts) -> Tensor:
    """Rows of `a` [t, k] in groups of `counts` rows, each times its matrix of `b` [groups, k, n]: [t, n].

    Torch needs rows of whole 16 bytes; others go to `looped_grouped_matmul`.
    """
    if not _aligned(a, b):
        return looped_grouped_matmul(a, b, counts)
    return torch._grouped_mm(a, b, offs=_ends(counts, a.device))


def torch_grouped_matmul_tn(a: Tensor, b: Tensor, counts: Counts) -> Tensor:
    """a^T b of each group of rows: `a` [t, m] and `b` [t, n] -> [groups, m, n]; zero for a group without rows."""
    if not _aligned(a, b):
        return looped_grouped_matmul_tn(a, b, counts)
    return torch._grouped_mm(a.t(), b, offs=_ends(counts, a.device))


def padded_grouped_matmul(a: Tensor, b: Tensor, counts: Counts) -> Tensor:
    """`torch_grouped_matmul` with few distinct sizes (`padded_rows`), for libraries that compile a kernel for each."""
    total, start = a.size(0), 0
    out = a.new_empty(total, b.size(2))
    for count, matrix in zip(counts, b, strict=True):
        end, padded = start + count, padded_rows(count, total)
        if start + padded <= total:  # writes rows of the next groups too, whose own turn overwrites them
            _multiply_into(a[start : start + padded], matrix, out[start : start + padded])
        else:
            out[start:end] = matmul(a[total - padded :], matrix)[start - total + padded :][:count]
        start = end
    return out


def padded_grouped_matmul_tn(a: Tensor, b: Tensor, counts: Counts) -> Tensor:
    """`torch_grouped_matmul_tn` with few distinct sizes (`padded_rows`)."""
    total, start = a.size(0), 0
    out = a.new_empty(len(counts), a.size(1), b.size(1))
    for count, result in zip(counts, out, strict=True):
        padded = padded_rows(count, total)
        first = min(start, total - padded)
        rows = a.new_zeros(padded, a.size(1))  # zeros in place of the rows of other groups
        rows[start - first :][:count] = a[start : start + count]
        torch.mm(rows.t(), b[first : first + padded], out=result)
        start += count
    return out


def padded_rows(count: int, total: int) -> int:
    """`count` rounded up by an eighth at most (16 at least), so that few sizes occur: oneDNN compiles a kernel for
    every size that it meets, which takes longer than a small GEMM, and routing changes the counts in every step.
    `total` is the number of rows that exist."""
    step = max(16, 1 << max(0, count.bit_length() - 4))
    padded = -(-count // step) * step
    return padded if padded <= total else count


def looped_grouped_matmul(a: Tensor, b: Tensor, counts: Counts) -> Tensor:
    """`torch_grouped_matmul` for rows of any width, one GEMM a group."""
    out = a.new_empty(a.size(0), b.size(2))
    for rows, matrix, result in zip(a.split(list(counts)), b.unbind(), out.split(list(counts)), strict=True):
        torch.mm(rows, matrix, out=result)
    return out


def looped_grouped_matmul_tn(a: Tensor, b: Tensor, counts: Counts) -> Tensor:
    """`torch_grouped_matmul_tn` for rows of any width, one GEMM a group."""
    out = a.new_empty(len(counts), a.size(1), b.size(1))
    for left, right, result in zip(a.split(list(counts)), b.split(list(counts)), out.unbind(), strict=True):
        torch.mm(left.t(), right, out=result)
    return out


def _aligned(*tensors: Tensor) -> bool:
    return all(step == 1 or step * t.element_size() % 16 == 0 for t in tensors for step in t.stride())


def _ends(counts: Counts, device: torch.device) -> Tensor:
    return torch.tensor(counts, device=device).cumsum(0, dtype=torch.int32)


def _multiply_into(a: Tensor, b: Tensor, out: Tensor) -> None:
    if a.dtype is torch.float32:
        out.copy_(onednn_matmul(a, b))
    else:
        torch.mm(a, b, out=out)


_GROUPED_MATMUL = {"padded": padded_grouped_matmul, "torch": torch_grouped_matmul}
_GROUPED_MATMUL_TN = {"padded": padded_grouped_matmul_tn, "torch": torch_grouped_matmul_tn}
KERNELS: dict[str, dict[str, Kernel]] = {
    "matmul": {"torch": torch.mm, "onednn": onednn_matmul},
    "outer": {"torch": torch_matmul_tn, "onednn": onednn_matmul_tn},
    "grouped_matmul": _GROUPED_MATMUL,
    "grouped_matmul_small": _GROUPED_MATMUL,
    "grouped_outer": _GROUPED_MATMUL_TN,
    "grouped_outer_small": _GROUPED_MATMUL_TN,
}
"""Candidates by operation. `_small` is the same operation on small groups (`SMALL_GROUP_ROWS`)."""

Choice = Mapping[str, str]
# Until a measurement says otherwise.
DEFAULTS: dict[torch.dtype, dict[str, str]] = {
    torch.float32: {
        "matmul": "onednn", "outer": "torch", "grouped_matmul": "torch", "grouped_matmul_small": "torch",
        "grouped_outer": "torch", "grouped_outer_small": "torch",
    },
    torch.bfloat16: {
        "matmul": "torch", "outer": "torch", "grouped_matmul": "padded", "grouped_matmul_small": "torch",
        "grouped_outer": "padded", "grouped_outer_small": "torch",
    },
}  # fmt: skip
_OTHER = dict.fromkeys(KERNELS, "torch")
_chosen: dict[torch.dtype, dict[str, Kernel]] = {}


def candidates(operation: str, dtype: torch.dtype) -> list[str]:
    """Kernels of `operation` that can run in `dtype`, the default first."""
    default = DEFAULTS.get(dtype, _OTHER)[operation]
    only_fp32 = {"onednn"}
    names = [name for name in KERNELS[operation] if dtype is torch.float32 or name not in only_fp32]
    return [default, *(name for name in names if name != default)]


def use(dtype: torch.dtype, choice: Choice) -> None:
    """Run the kernels of `choice` (name by operation) for tensors of `dtype`; the defaults for what it leaves out.

    Raises:
        KeyError: there is no such operation or kernel.
    """
    names = {**DEFAULTS.get(dtype, _OTHER), **choice}
    _chosen[dtype] = {operation: KERNELS[operation][name] for operation, name in names.items()}


def _kernels(dtype: torch.dtype) -> dict[str, Kernel]:
    if dtype not in _chosen:
        use(dtype, {})
    return _chosen[dtype]


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """[m, k] x [k, n] -> [m, n]."""
    return _kernels(a.dtype)["matmul"](a, b)


def matmul_few_rows(a: Tensor, b: Tensor) -> Tensor:
    """[m, k] x [k, n] -> [m, n], by torch where calling oneDNN would take longer than the GEMM."""
    multiplications = a.size(0) * b.numel()
    if a.dtype is torch.bfloat16 and b.stride(0) == 1:
        is_small = a.size(0) == 1 or multiplications <= NATIVE_MULTIPLICATIONS
        return _native_matmul(a, b) if is_small else torch.mm(a, b)
    is_small = b.numel() <= SMALL_MATRIX and multiplications <= MKL_MULTIPLICATIONS
    return torch.mm(a, b) if is_small else matmul(a, b)


def _native_matmul(a: Tensor, b: Tensor) -> Tensor:
    """[m, k] x [k, n] -> [m, n] by torch's own kernel, where `torch.mm` takes oneDNN for bf16.

    It needs the columns of `b` in one piece, and sums in fp32 as oneDNN does. `torch.backends.mkldnn.flags` would do
    the same in 8 us. The switch is the process's, so one thread may call this at a time: that of the forward pass.
    """
    onednn: Any = torch.backends.mkldnn
    before = onednn.enabled
    onednn.enabled = False
    try:
        return torch.mm(a, b)
    finally:
        onednn.enabled = before


def matmul_tn(a: Tensor, b: Tensor) -> Tensor:
    """a^T b: [t, m] and [t, n] -> [m, n]."""
    return _kernels(a.dtype)["outer"](a, b)


def attention_scores(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The sum over pairs of queries [m, d] times keys [k, d], each with a `d` of its own: [m, k]."""
    (queries, keys), *others = pairs
    count = _batches_of_keys(queries, keys)
    if not count:
        scores = torch.mm(queries, keys.t())
        for more_queries, more_keys in others:
            scores.addmm_(more_queries, more_keys.t())
        return scores
    end = count * KEYS_AT_ONCE
    batches = torch.bmm(queries.expand(count, -1, -1), _batched(keys, count).mT)
    for more_queries, more_keys in others:
        batches.baddbmm_(more_queries.expand(count, -1, -1), _batched(more_keys, count).mT)
    scores = batches.transpose(0, 1).reshape(len(queries), end)
    if end == len(keys):
        return scores
    return torch.cat([scores, attention_scores([(own, own_keys[end:]) for own, own_keys in pairs])], dim=1)


def attention_values(weights: Tensor, values: Tensor) -> Tensor:
    """Weights [m, k] times values [k, d]: [m, d]."""
    count = _batches_of_keys(weights, values)
    if not count:
        return torch.mm(weights, values)
    end = count * KEYS_AT_ONCE
    batches = weights[:, :end].unflatten(1, (count, -1)).transpose(0, 1)
    out = torch.bmm(batches, _batched(values, count)).sum(dim=0)
    return out if end == len(values) else out.addmm_(weights[:, end:], values[end:])


def _batches_of_keys(queries: Tensor, keys: Tensor) -> int:
    """How many `KEYS_AT_ONCE` to compute in a batch; 0 where one GEMM is faster."""
    is_slow = len(queries) <= FEW_QUERIES and len(keys) >= LONG_KEYS
    return len(keys) // KEYS_AT_ONCE if is_slow and keys.dtype is torch.float32 and keys.device.type == "cpu" else 0


def _batched(x: Tensor, count: int) -> Tensor:
    """The first rows of [k, d] -> [count, `KEYS_AT_ONCE`, d]."""
    return x[: count * KEYS_AT_ONCE].unflatten(0, (count, KEYS_AT_ONCE))


def grouped_matmul(a: Tensor, b: Tensor, counts: Counts) -> Tensor:
    """Rows of `a` [t, k] in groups of `counts` rows, each times its matrix of `b` [groups, k, n]: [t, n]."""
    return _kernels(a.dtype)["grouped_matmul" + _size(a, counts)](a, b, counts)


def grouped_matmul_tn(a: Tensor, b: Tensor, counts: Counts) -> Tensor:
    """a^T b of each group of rows: `a` [t, m] and `b` [t, n] -> [groups, m, n]; zero for a group without rows."""
    return _kernels(a.dtype)["grouped_outer" + _size(a, counts)](a, b, counts)


def _size(a: Tensor, counts: Counts) -> str:
    return "_small" if a.size(0) <= SMALL_GROUP_ROWS * len(counts) else ""
