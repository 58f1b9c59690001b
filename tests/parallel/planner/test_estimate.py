"""The schedule and the memory that an estimate takes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from parallel.planner.estimate import estimate, fullest_bytes, megatron_schedule
from parallel.planner.memory import Weights
from tests.parallel.planner import small

WEIGHTS = [Weights(shared=10_000, experts=0), Weights(shared=10, experts=0)]
STAGES = [["E", "t"], ["t", "L"]]


@pytest.mark.parametrize(("vpp", "schedule"), [(1, "1f1b"), (2, "interleaved"), (3, "interleaved")])
def test_megatron_interleaves_chunks_where_there_are_several(vpp: int, schedule: str) -> None:
    assert megatron_schedule(small.workload(small.GQA, {"pp": 2, "vpp": vpp})) == schedule


def test_the_peak_rank_counts() -> None:
    """The first stage has a thousand times the weights, and one micro-batch more: two, where the second holds one."""
    one = small.workload(small.GQA, {"pp": 2}, stages=STAGES, micro_batches=4)
    found = estimate(one, small.HARDWARE, small.SOFTWARE, WEIGHTS, constants=small.CONSTANTS)
    assert found.schedule == "1f1b"
    first, second = found.memory_of_ranks
    assert first > second
    assert found.memory_bytes == first
    assert fullest_bytes(one, WEIGHTS) == first
    # With DualPipe each rank holds two stages, and half of the optimizer state of each.
    both = fullest_bytes(one, WEIGHTS, "dualpipe")
    assert both != first
    dual = estimate(one, small.HARDWARE, small.SOFTWARE, WEIGHTS, "dualpipe", small.CONSTANTS)
    assert (dual.schedule, dual.memory_bytes) == ("dualpipe", both)


def test_an_estimate_that_fills_the_memory_to_the_byte_fits() -> None:
    one = small.workload(small.GQA, {"pp": 2}, stages=STAGES, micro_batches=4)
    needed = fullest_bytes(one, WEIGHTS)
    for room, fits in ((needed, True), (needed - 1, False)):
        hardware = replace(small.HARDWARE, memory_gib=room / 2**30, reserved_gib=0.0)
        assert estimate(one, hardware, small.SOFTWARE, WEIGHTS, constants=small.CONSTANTS).fits is fits
