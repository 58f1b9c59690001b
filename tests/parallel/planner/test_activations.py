"""Activations as DeepSeek-V3 keeps them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moe_train.config.composition.compose import compose
from moe_train.config.composition.validate import validate
from moe_train.model.memory import weights_of, workload_of
from parallel.planner.activations import E4M3_BYTES, E5M6_BYTES, layer, shared_embedding_bytes
from parallel.planner.memory import memory_of_ranks, stage_memory
from parallel.planner.workload import Workload
from tests.parallel.planner import small

GIB = 2**30
V3 = [
    "model=deepseek_v3", "parallel=deepseek_v3_h800", "runtime=cuda", "batch=large", "train.seq_length=4096",
    "precision=fp8_block", "recompute=deepseek_v3",
]  # fmt: skip


def workload(**changes: object) -> Workload:
    cfg = compose(V3)
    return replace(workload_of(cfg, validate(cfg)), fp8_weights_only=True, moment_bytes=2, **changes)


def fullest(one: Workload) -> float:
    cfg = compose(V3)
    memory = [stage_memory(one, rank, weights) for rank, weights in enumerate(weights_of(cfg.model, one))]
    return max(memory_of_ranks(one, "dualpipe", memory))


def test_bytes_of_the_formats() -> None:
    """E4M3 has 1 byte and E5M6 1.5, and 128 elements share a scale in fp32."""
    assert 128 * E4M3_BYTES == 128 + 4
    assert 128 * E5M6_BYTES == 192 + 4


def test_what_a_layer_keeps() -> None:
    """SwiGLU's inputs in FP8 and not its output, attention's output once and in 12 bits (sections 3.2.3, 3.3.3)."""
    plain, compact = layer(workload(), moe=True), layer(workload(compact=True), moe=True)
    tokens = 4096
    assert compact["routed experts: gate and up"] == pytest.approx(8 * tokens * 2 * 2048 * E4M3_BYTES)
    assert compact["attention output"] == pytest.approx(tokens * 128 * 128 * E5M6_BYTES)
    assert set(plain) - set(compact) == {"attention output in fp8", "shared experts: down input in fp8"}
    dense = set(layer(workload(), moe=False)) - set(layer(workload(compact=True), moe=False))
    assert dense == {"attention output in fp8", "feed-forward: down input in fp8"}
    same = set(compact) - {"routed experts: gate and up", "shared experts: gate and up", "attention output"}
    assert {name: compact[name] for name in same} == {name: plain[name] for name in same}


def test_the_published_layout_fits_the_memory_it_ran_in() -> None:
    assert fullest(workload(compact=True)) < 78.6 * GIB < fullest(workload())


def test_the_embedding_is_held_once() -> None:
    one = workload(compact=True)
    assert shared_embedding_bytes(one) == (2 + 4) * one.model.padded_vocab_size * one.model.hidden_size
    halved = replace(one, layout=replace(one.layout, tp=2))
    assert shared_embedding_bytes(halved) == shared_embedding_bytes(one) / 2
    assert shared_embedding_bytes(workload()) == 0
    assert shared_embedding_bytes(replace(one, stages=[["E", "t"], ["t", "L"]])) == 0


def test_bytes_of_a_layer_with_latents_on_the_local_backend() -> None:
    """tp=2 with sequence parallelism in BF16: 8 of 16 tokens where it divides them, hidden 10, 2 heads of 8 and of 5.

    A norm keeps its input and its normalised input in 4 bytes, and one root a token. Values are padded to the keys.
    """
    one = small.workload(small.MLA, {"tp": 2}, sequence_parallel=True, backend="local")
    norms = {
        f"{name}: {what}": 4 * 8 * width
        for name, size in (("input norm", 10), ("query norm", 3), ("key/value norm", 4), ("feed-forward norm", 10))
        for what, width in (("input in fp32", size), ("normalised", size), ("1 / root", 1))
    }
    rotary = {f"rotary {f} of {what}": 2 * 16 * 2 for f in ("cosine", "sine") for what in ("queries", "keys")}
    assert layer(one, moe=False) == norms | rotary | {
        "input norm output": 2 * 8 * 10, "query norm output": 2 * 8 * 3, "key/value norm output": 2 * 8 * 4,
        "queries": 2 * 16 * 2 * 8, "keys": 2 * 16 * 2 * 8, "padded values": 2 * 16 * 2 * 8,
        "padded attention output": 2 * 16 * 2 * 8, "log-sum-exp": 4 * 16 * 2, "attention output": 2 * 16 * 2 * 5,
        "feed-forward input": 2 * 8 * 10, "feed-forward: gate and up": 2 * 16 * 12, "feed-forward: silu": 2 * 16 * 6,
        "feed-forward: up": 2 * 16 * 6, "feed-forward: down input": 2 * 16 * 6,
    }  # fmt: skip


def test_bytes_of_latents_that_are_recomputed() -> None:
    """Transformer Engine then keeps the latents alone: 8 tokens of 3 and of 4 + 2; rotary keys of all 16 tokens."""
    one = small.workload(
        small.MLA,
        {"tp": 2},
        sequence_parallel=True,
        recompute="selective",
        recompute_modules=frozenset({"mla_up_proj"}),
    )
    kept = layer(one, moe=False)
    assert (kept["query latent"], kept["key/value latent"]) == (2 * 8 * 3, 2 * 8 * 6)
    assert (kept["rotary angles"], kept["rotary key"]) == (4 * 16 * 2, 2 * 16 * 2)


def test_bytes_of_routed_experts_with_grouped_queries_on_transformer_engine() -> None:
    """16 tokens in BF16, 4 heads and 2 key/value heads of 6 with a norm each; 2 of 4 experts of inner 6, 32 visits."""
    model = replace(
        small.GQA, qk_norm="head", num_shared_experts=2, shared_expert_gate=True, balance_losses=["aux_loss"],
        balance_loss_coeffs=[1e-3],
    )  # fmt: skip
    router = {"chosen experts": 8 * 2, "token map": 4, "token weights": 4 * 4, "token order": 8 * 2, "scores": 4 * 2,
              "balance loss: scores": 4 * 4, "balance loss: chosen experts": 8 * 2}  # fmt: skip
    attention = {
        "input": 2 * 16 * 10, "input norm: 1 / root": 4 * 16, "input norm output": 2 * 16 * 10,
        "queries, keys and values": 2 * 16 * (4 + 2 * 2) * 6, "queries before norm": 2 * 16 * 4 * 6,
        "query norm": 4 * 16 * 4, "key norm": 4 * 16 * 2, "queries": 2 * 16 * 24, "keys": 2 * 16 * 12,
        "values": 2 * 16 * 12, "attention output": 2 * 16 * 24, "log-sum-exp": 4 * 16 * 4,
    }  # fmt: skip
    experts = {
        "middle": 2 * 16 * 10, "feed-forward norm: 1 / root": 4 * 16, "feed-forward input": 2 * 16 * 10,
        "routed expert input": 2 * 32 * 10, "routed experts: gate and up": 2 * 32 * 12,
        "routed experts: router weights": 4 * 32, "routed experts: down input": 2 * 32 * 6,
        "shared experts: gate and up": 2 * 16 * 24, "shared experts: silu": 2 * 16 * 12,
        "shared experts: up": 2 * 16 * 12, "shared experts: down input": 2 * 16 * 12,
        "shared experts: gate": 2 * 16, "shared experts: output": 2 * 16 * 10,
    }  # fmt: skip
    expected = attention | {f"router: {name}": 16 * size for name, size in router.items()} | experts
    assert layer(small.workload(model), moe=True) == expected


def test_keys_and_values_are_repeated_for_each_query_on_the_local_backend() -> None:
    """tp=2: 2 query heads of 6 for 1 key/value head. In FP32, norms over all heads keep one FP32 tensor each."""
    one = small.workload(replace(small.GQA, qk_norm="full"), {"tp": 2}, backend="local", dtype="fp32")
    kept = layer(one, moe=False)
    assert kept["queries, keys and values"] == 4 * 16 * (2 + 2 * 1) * 6
    assert kept["queries before norm"] == 4 * 16 * 2 * 6
    assert (kept["query norm"], kept["key norm"]) == (4 * 16 + 4 * 16 * 12, 4 * 16 + 4 * 16 * 6)
    assert {kept[name] for name in ("queries", "expanded keys", "expanded values")} == {4 * 16 * 12}
    assert "keys" not in kept
    single = layer(small.workload(replace(small.GQA, num_query_groups=4), backend="local"), moe=False)
    assert (single["queries"], single["keys"]) == (2 * 16 * 24, 2 * 16 * 24)
    assert "expanded keys" not in single
