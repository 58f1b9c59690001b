"""The CPU kernels of the `local` backend compute what torch's own operations do, gradients included."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moe_train.model.kernels import cpu_gemm, gemm
from moe_train.model.local.attention import ShortAttention
from moe_train.model.local.loss import CrossEntropy
from moe_train.model.local.norm import NormOnCPU
from moe_train.model.local.swiglu import SwiGLU, WeightedSwiGLU


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


def reference(a: Tensor, b: Tensor, counts: list[int], outer: bool) -> Tensor:
    """The same in float64, group by group."""
    groups = zip(a.double().split(counts), b.double().split(counts) if outer else b.double(), strict=True)
    return torch.stack([x.t() @ y for x, y in groups]) if outer else torch.cat([x @ y for x, y in groups])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("operation", list(cpu_gemm.KERNELS))
def test_every_kernel_computes_its_operation(operation: str, dtype: torch.dtype) -> None:
    """For even and odd widths, groups without rows, and one group that has them all."""
    generator = torch.Generator().manual_seed(3)
    outer = "outer" in operation
    for width, counts in ((24, [5, 0, 130, 65]), (25, [1, 2, 3]), (8, [0, 40, 0])):
        rows = sum(counts)
        a = torch.randn(rows, width, generator=generator).to(dtype)
        shape = (rows, 16) if outer else ((len(counts), width, 16) if "grouped" in operation else (width, 16))
        b = torch.randn(shape, generator=generator).to(dtype)
        if "grouped" in operation:
            expected, arguments = reference(a, b, counts, outer), (a, b, counts)
        else:
            expected, arguments = (a.double().t() if outer else a.double()) @ b.double(), (a, b)  # type: ignore[assignment]
        for name in cpu_gemm.candidates(operation, dtype):
            found = cpu_gemm.KERNELS[operation][name](*arguments)
            assert found.dtype is dtype, name
            tolerance = 1e-5 if dtype is torch.float32 else 2e-2
            torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance * 10, msg=name)


@pytest.mark.parametrize("rows", [1, 2, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_few_rows_times_any_matrix(dtype: torch.dtype, rows: int) -> None:
    """By either kernel, with the columns of the matrix in one piece, as those of weights are, and not."""
    generator = torch.Generator().manual_seed(4)
    for width, columns in ((24, 25), (96, 1000), (640, 1000)):
        a = torch.randn(rows, width, generator=generator).to(dtype)
        weight = torch.randn(columns, width, generator=generator).to(dtype)
        for b in (weight.t(), weight.t().contiguous()):
            found = cpu_gemm.matmul_few_rows(a, b)
            assert found.dtype is dtype
            tolerance = 1e-5 if dtype is torch.float32 else 1e-2
            torch.testing.assert_close(found.double(), a.double() @ b.double(), rtol=tolerance, atol=tolerance * 10)


@pytest.mark.parametrize("enabled", [True, False])
def test_onednn_is_left_as_it_was(enabled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after an error, and where it is switched off."""
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", enabled)
    row, matrix = torch.ones(1, 8, dtype=torch.bfloat16), torch.ones(4, 8, dtype=torch.bfloat16).t()
    assert cpu_gemm.matmul_few_rows(row, matrix).tolist() == [[8.0] * 4]
    assert torch.backends.mkldnn.enabled is enabled
    with pytest.raises(RuntimeError):
        cpu_gemm.matmul_few_rows(row[:, :5], matrix)
    assert torch.backends.mkldnn.enabled is enabled


def test_a_row_in_bf16_does_not_call_onednn() -> None:
    """Calling it takes longer than the GEMM of one row."""
    row, weight = torch.ones(1, 128, dtype=torch.bfloat16), torch.ones(64, 128, dtype=torch.bfloat16)
    seen: list[bool] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(torch.backends.mkldnn.enabled)
            return function(*args, **(kwargs or {}))

    with Watch():
        cpu_gemm.matmul_few_rows(row, weight.t())
        cpu_gemm.matmul_few_rows(row.expand(64, -1), weight.t())
        cpu_gemm.matmul_few_rows(row, weight.t().contiguous())
    assert seen.count(False) == 1


def test_weight_gradients_go_to_the_buffer_of_ddp() -> None:
    """Two micro-batches add up in `main_grad`, and DDP's hook is told so; a shared weight keeps its own gradient."""
    for shared in (False, True):
        weight = torch.nn.Parameter(torch.randn(6, 4))
        weight.main_grad, weight.grad_added_to_main_grad = torch.ones(6, 4), False  # type: ignore[attr-defined]
        weight.zero_out_wgrad = shared  # type: ignore[attr-defined]
        x = torch.randn(10, 4)
        for _ in range(2):
            gemm.linear(x, weight).sum().backward()
        expected = 2 * torch.ones(10, 6).t() @ x
        if shared:
            torch.testing.assert_close(weight.grad, expected)
            assert not weight.grad_added_to_main_grad  # type: ignore[attr-defined]
        else:
            torch.testing.assert_close(weight.main_grad, 1 + expected)  # type: ignore[attr-defined]
            assert weight.grad_added_to_main_grad  # type: ignore[attr-defined]


def test_weight_gradients_of_experts_go_to_the_buffer_of_ddp() -> None:
    weight = torch.nn.Parameter(torch.randn(3, 6, 4))
    weight.main_grad, weight.grad_added_to_main_grad = torch.ones(3, 6, 4), False  # type: ignore[attr-defined]
    x, counts = torch.randn(10, 4), [7, 0, 3]
    gemm.GroupedLinear.apply(x, weight, counts).sum().backward()
    expected = torch.stack([torch.ones(len(rows), 6).t() @ rows for rows in x.split(counts)])
    torch.testing.assert_close(weight.main_grad, 1 + expected)  # type: ignore[attr-defined]
    assert weight.grad_added_to_main_grad  # type: ignore[attr-defined]


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 100, 511, 512, 517, 5000])
def test_few_sizes_and_little_padding(count: int) -> None:
    """At most an eighth more rows (16 for small groups), and never more than there are."""
    padded = cpu_gemm.padded_rows(count, 10**6)
    assert count <= padded <= max(count * 1.125 + 1, count + 15)
    assert cpu_gemm.padded_rows(count, count) == count
    assert len({cpu_gemm.padded_rows(n, 10**6) for n in range(512, 1024)}) <= 9


def test_weighted_swiglu() -> None:
    def plain(x: Tensor, probs: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up * probs[:, None]

    assert_same(WeightedSwiGLU.apply, plain, [torch.randn(50, 24), torch.rand(50)])


def test_swiglu() -> None:
    def plain(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up

    assert_same(SwiGLU(None), plain, [torch.randn(5, 10, 24)])


@pytest.mark.parametrize("shape", [(7, 24), (3, 5, 8), (2, 3, 4, 16)], ids=str)
def test_norm_on_a_cpu(shape: tuple[int, ...]) -> None:
    """Also of rows that are not contiguous, as queries and keys are."""
    size = shape[-1]
    weight = torch.rand(size)
    assert_same(
        lambda x, w: NormOnCPU.apply(x, w, 1e-3),
        lambda x, w: F.rms_norm(x, (size,), w, 1e-3),
        [torch.randn(shape), weight],
    )
    wide = torch.randn(*shape[:-1], 2 * size)
    torch.testing.assert_close(
        NormOnCPU.apply(wide[..., size:], weight, 1e-3), F.rms_norm(wide[..., size:], (size,), weight, 1e-3)
    )


@pytest.mark.parametrize("tokens", [17, 64, 65, 200])
def test_short_attention(tokens: int) -> None:
    """Shorter than a block of queries, one block, and several of which the last is not full."""

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3).permute(2, 0, 1, 3).flatten(2)

    inputs = [torch.randn(tokens, 2, 3, size) for size in (8, 8, 5)]
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


@pytest.mark.parametrize("keys", [48, cpu_gemm.LONG_KEYS, cpu_gemm.LONG_KEYS + cpu_gemm.KEYS_AT_ONCE + 16])
@pytest.mark.parametrize("rows", [8, cpu_gemm.FEW_QUERIES + 1])
def test_attention_of_few_queries(keys: int, rows: int) -> None:
    generator = torch.Generator().manual_seed(keys)
    queries, rotary, latents, rotary_keys = (
        torch.randn(shape, generator=generator) for shape in ((rows, 64), (rows, 16), (keys, 64), (keys, 16))
    )
    scores = cpu_gemm.attention_scores([(rotary, rotary_keys), (queries, latents)])
    torch.testing.assert_close(scores, rotary @ rotary_keys.t() + queries @ latents.t())
    weights = scores.softmax(dim=-1)
    torch.testing.assert_close(cpu_gemm.attention_values(weights, latents), weights @ latents)
