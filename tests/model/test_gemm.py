"""The CPU kernels of the `local` backend compute what torch's own operations do, gradients included."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_train.model import gemm
from moe_train.model.attention import ShortAttention
from moe_train.model.experts import WeightedSwiGLU
from moe_train.model.loss import CrossEntropy


def assert_same(
    ours: Callable[..., Tensor], theirs: Callable[..., Tensor], inputs: list[Tensor], tolerance: float = 1e-5
) -> None:
    """Same output and gradients, up to `tolerance` of the largest entry of each."""
    inputs = [x.requires_grad_() for x in inputs]
    found, expected = ours(*inputs), theirs(*inputs)
    assert found.shape == expected.shape
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(9)).to(expected.dtype)
    pairs = [(found, expected)]
    pairs += zip(
        torch.autograd.grad(found, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    )
    for a, b in pairs:
        assert a.shape == b.shape
        assert (a - b).abs().max() <= tolerance * max(b.abs().max().item(), 1e-3) if b.numel() else True


@pytest.mark.parametrize("shape", [(3, 2, 24, 8), (7, 1, 8, 40), (64, 4, 96, 300)], ids=str)
def test_linear(shape: tuple[int, ...]) -> None:
    """Narrow to wide and wide to narrow: the weight gradient takes another way in each."""
    s, b, inputs, outputs = shape
    assert_same(gemm.linear, F.linear, [torch.randn(s, b, inputs), torch.randn(outputs, inputs)])


@pytest.mark.parametrize("seed", range(30))
def test_grouped_linear_for_any_counts(seed: int) -> None:
    """Groups with no rows, with few and with many, in any order: rows that come along never reach a result."""
    choose = random.Random(seed)
    largest = choose.choice([60, 300])
    counts = [
        choose.choice([0, 1, 3, choose.randint(0, 40), choose.randint(0, largest)]) for _ in range(choose.randint(1, 9))
    ]
    width = choose.choice([24, 25])  # of rows that torch's own grouped product takes, and not
    x, weight = torch.randn(sum(counts), width), torch.randn(len(counts), 8, width)
    assert_same(
        lambda x, w: gemm.GroupedLinear.apply(x, w, counts),
        lambda x, w: torch.cat([rows @ matrix.t() for rows, matrix in zip(x.split(counts), w, strict=True)]),
        [x, weight],
    )


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 100, 511, 512, 517, 5000])
def test_few_sizes_and_little_padding(count: int) -> None:
    """At most an eighth more rows (16 for small groups), and never more than there are."""
    padded = gemm._padded(count, 10**6)
    assert count <= padded <= max(count * 1.125 + 1, count + 15)
    assert gemm._padded(count, count) == count
    assert len({gemm._padded(n, 10**6) for n in range(512, 1024)}) <= 9


def test_weighted_swiglu() -> None:
    def plain(x: Tensor, probs: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up * probs[:, None]

    assert_same(WeightedSwiGLU.apply, plain, [torch.randn(50, 24), torch.rand(50)])


def test_short_attention() -> None:
    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3).permute(2, 0, 1, 3).flatten(2)

    inputs = [torch.randn(17, 2, 3, 8), torch.randn(17, 2, 3, 8), torch.randn(17, 2, 3, 5)]
    assert_same(lambda q, k, v: ShortAttention.apply(q, k, v, 0.3), plain, inputs)


@pytest.mark.parametrize(("vocabulary", "padded"), [(50, 50), (50, 128), (4096, 4096), (4001, 4096)])
def test_cross_entropy(vocabulary: int, padded: int) -> None:
    """In one block of rows and in several, also where the label's probability is too small for fp32."""
    labels = torch.randint(0, vocabulary, (200,))
    logits = torch.randn(200, padded)
    logits[0, labels[0]] = -200.0
    assert_same(
        lambda x: CrossEntropy.apply(x, labels, vocabulary),
        lambda x: F.cross_entropy(x[:, :vocabulary], labels, reduction="none"),
        [logits],
    )
    assert math.isfinite(CrossEntropy.apply(logits.detach(), labels, vocabulary).max())


def test_cross_entropy_of_bf16_logits_is_as_precise_as_fp32() -> None:
    labels = torch.randint(0, 512, (64,))
    logits = torch.randn(64, 512).bfloat16()
    found = CrossEntropy.apply(logits, labels, 512)
    assert found.dtype is torch.float32
    assert torch.allclose(found, F.cross_entropy(logits.float(), labels, reduction="none"), atol=1e-5)
