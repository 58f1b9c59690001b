"""Our grouped GEMM on the CPU and `torch._grouped_mm`, in the shapes of an experts' layer.

Every call gets new counts of tokens, as routing gives them: a library that compiles a kernel for each new size looks
twice as fast while the counts stay the same. The two take turns.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from bench.step_data import StepTask
from moe_train.model.kernels import gemm
from moe_train.model.kernels.cpu_kernels import uneven_counts
from moe_train.model.precision import DTYPES

CALLS, WARM_UP = 60, 10

Product = Callable[[Sequence[int]], object]


def measure(task: StepTask) -> list[dict[str, Any]]:
    """Milliseconds of the three GEMMs of fc1: in the task's shape, and with few tokens an expert."""
    model, rows = task.config().model, []
    inner = 2 * model.moe_ffn_hidden_size
    for tokens, experts in ((task.tokens * model.topk, model.num_experts), (2048, 64)):
        for name, (ours, theirs) in _products(DTYPES[task.dtype], tokens, experts, model.hidden_size, inner).items():
            rng = random.Random(experts)
            times_ms: list[tuple[float, float]] = []
            for _ in range(CALLS):
                counts = uneven_counts(tokens, experts, rng)
                times_ms.append((_ms(ours, counts), _ms(theirs, counts)))
            ours_ms, theirs_ms = (statistics.median(pair[side] for pair in times_ms[WARM_UP:]) for side in (0, 1))
            rows.append({
                "model": task.model, "precision": task.dtype, "experts": experts, "tokens": tokens, "product": name,
                "ours_ms": ours_ms, "torch_ms": theirs_ms, "torch_over_ours": theirs_ms / ours_ms,
            })  # fmt: skip
    return rows


def _ms(product: Product, counts: Sequence[int]) -> float:
    start = time.perf_counter()
    product(counts)
    return (time.perf_counter() - start) * 1e3


def _products(
    dtype: torch.dtype, tokens: int, experts: int, hidden: int, inner: int
) -> dict[str, tuple[Product, Product]]:
    """fprop, dgrad and wgrad."""
    x, grad = torch.randn(tokens, hidden, dtype=dtype), torch.randn(tokens, inner, dtype=dtype)
    weight = torch.randn(experts, inner, hidden, dtype=dtype)

    def theirs(a: torch.Tensor, b: torch.Tensor) -> Product:
        return lambda counts: torch._grouped_mm(a, b, offs=torch.tensor(counts).cumsum(0, dtype=torch.int32))

    return {
        "output": (lambda counts: gemm.grouped_matmul(x, weight.mT, counts), theirs(x, weight.mT)),
        "input gradient": (lambda counts: gemm.grouped_matmul(grad, weight, counts), theirs(grad, weight)),
        "weight gradient": (lambda counts: gemm.grouped_matmul_tn(grad, x, counts), theirs(grad.t(), x)),
    }
