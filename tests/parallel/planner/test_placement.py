"""Groups of ranks on the network, and what they send in a step, counted by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from parallel.layout import ParallelLayout
from parallel.planner.memory import Weights
from parallel.planner.placement import members, node_spans, placements
from parallel.planner.software import Software
from tests.parallel.planner import small

DEGREES = {"tp": 2, "cp": 2, "dp": 4, "pp": 2, "ep": 8}
STAGES = [["E", "t"], ["t", "t", "L"]]
WEIGHTS = Weights(shared=100, experts=40)


def sent(software: Software, domain_gpus: int, degrees: dict[str, int] = DEGREES) -> dict[str, float]:
    hardware = replace(small.HARDWARE, domain_gpus=domain_gpus)
    one = small.workload(small.GQA, degrees, stages=STAGES)
    return {found.kind: found.network_bytes for found in placements(one, hardware, software, WEIGHTS)}


def test_bytes_that_leave_an_nvlink_domain() -> None:
    """Three micro-batches of 8 tokens a rank pass the two layers of the fuller stage: 6 passes of 20 bytes a token.

    Domains of 2 GPUs hold the tp groups. cp: 6 x 8 tokens with keys and values of 2 x 2 heads of 6 in BF16 over tp=2,
    6 x 6 x 8 x 24. dp: gradients in 4 bytes and weights in 2 of 100 parameters, of which 3/4 are others'. edp: 40
    parameters in two ranks. pp: 2 x 3 micro-batches of 8 x 20 bytes. ep: 8 tokens to two experts, 3/4 of them in other
    domains, 240 bytes; 2 x 6 passes, there and back.
    """
    assert sent(Software(dispatcher="alltoall"), 2) == pytest.approx(
        {"tp": 0, "cp": 6912, "dp": 450, "pp": 960, "etp": 0, "ep": 12 * 240 * 2, "edp": 120}
    )
    # In FP8 a token travels as 1 + 4 / 128 bytes an element and comes back in 2.
    in_fp8 = sent(Software(dispatcher="alltoall", fp8_dispatch=True), 2)
    assert in_fp8["ep"] == pytest.approx(12 * 240 * (1 + (1 + 4 / 128) / 2))


def test_tensor_parallel_ranks_on_different_nodes_send_half_of_ten_tensors_a_layer() -> None:
    assert sent(Software(dispatcher="alltoall"), 1)["tp"] == pytest.approx(6 * 10 * 8 * 20 / 2)
    # Three expert-tensor-parallel ranks on three nodes: two thirds of what 16 tokens have, in 2 chunks of 2 layers.
    etp = sent(Software(dispatcher="alltoall"), 1, {"pp": 2, "vpp": 2, "etp": 3, "dp": 3})
    assert etp["etp"] == pytest.approx(3 * 2 * 2 * 10 * 16 * 20 * 2 / 3)


def test_members_of_a_group_are_a_stride_apart() -> None:
    layout = ParallelLayout.resolve(**{"vpp": 1, "etp": 1} | DEGREES)
    assert members(layout, "tp", 5) == (4, 5)
    assert members(layout, "cp", 5) == (5, 7)
    assert members(layout, "dp", 5) == (1, 5, 9, 13)
    assert members(layout, "pp", 21) == (5, 21)
    assert members(layout, "ep", 21) == (16, 17, 18, 19, 20, 21, 22, 23)
    assert members(layout, "edp", 21) == (21, 29)


def test_nodes_that_the_groups_span() -> None:
    """Nodes of 4: ranks 0 to 3 are one cp group of two tp pairs each; a dp group has a rank in 4 of them."""
    layout = ParallelLayout.resolve(**{"vpp": 1, "etp": 1} | DEGREES)
    found = {one.name: (one.size, one.groups, one.nodes, one.per_node) for one in node_spans(layout, 4)}
    assert found == {
        "tp": (2, 16, 1, 2), "cp": (2, 16, 1, 2), "dp": (4, 8, 4, 4), "pp": (2, 16, 2, 4), "ep": (8, 4, 2, 1)
    }  # fmt: skip
