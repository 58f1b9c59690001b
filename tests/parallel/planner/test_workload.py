"""What follows from the fields of a workload."""

from __future__ import annotations

from dataclasses import replace

import pytest

from parallel.planner.workload import query_block, short_attention_scores
from tests.parallel.planner.small import GQA, workload


def test_scores_of_short_attention_are_those_of_its_blocks() -> None:
    """A block of queries sees the keys up to its own end: the blocks above the diagonal are skipped."""
    assert (query_block(4), query_block(2)) == (64, 128)
    assert short_attention_scores(64, 4) == 64 * 64
    assert short_attention_scores(100, 4) == 64 * 64 + 36 * 100
    assert short_attention_scores(300, 2) == 128 * 128 + 128 * 256 + 44 * 300


@pytest.mark.parametrize(
    ("changes", "degrees", "short"),
    [
        ({}, {}, True),
        ({"seq_length": 512}, {}, True),
        ({"seq_length": 513}, {}, False),
        ({}, {"cp": 2}, False),
        ({"on_cpu": False}, {}, False),
        ({"backend": "te"}, {}, False),
    ],
)
def test_attention_keeps_probabilities_of_short_sequences(
    changes: dict[str, object], degrees: dict[str, int], short: bool
) -> None:
    given = {"on_cpu": True, "backend": "local"} | changes
    assert workload(GQA, degrees, **given).short_attention is short


def test_the_label_says_what_each_chunk_recomputes() -> None:
    one = workload(GQA)
    assert one.recomputes == "none"
    assert replace(one, recompute="full").recomputes == "full"
    chosen = ("selective", frozenset({"moe_act", "layernorm"}))
    assert replace(one, recompute=chosen[0], recompute_modules=chosen[1]).recomputes == "layernorm+moe_act"
    each = (("full", frozenset[str]()), chosen, ("none", frozenset[str]()))
    assert replace(one, recompute_of_chunks=each).recomputes == "full|layernorm+moe_act|none"


def test_tokens_are_divided_by_context_and_sequence_parallelism() -> None:
    one = workload(GQA, {"tp": 2, "cp": 2})
    assert (one.tokens, one.split_tokens) == (8, 8)
    assert replace(one, sequence_parallel=True).split_tokens == 4
    assert workload(GQA).expert_tokens == 16 * 2
    capacity = workload(replace(GQA, capacity_factor=1.5))
    assert capacity.expert_tokens == 32  # no expert gets more than there are
    assert workload(replace(GQA, capacity_factor=0.5)).expert_tokens == 16
    assert workload(replace(GQA, capacity_factor=1.5, pad_to_capacity=True)).expert_tokens == 48
