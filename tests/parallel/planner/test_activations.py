"""Activations as DeepSeek-V3 keeps them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moe_train.config.composition.compose import compose
from moe_train.config.composition.validate import validate
from moe_train.model.memory import weights_of_stage, workload_of
from parallel.planner.activations import E4M3_BYTES, E5M6_BYTES, layer, shared_embedding_bytes
from parallel.planner.memory import memory_of_ranks, stage_memory
from parallel.planner.workload import Workload

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
    memory = [stage_memory(one, rank, weights_of_stage(cfg.model, one, rank)) for rank in range(one.layout.pp)]
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
