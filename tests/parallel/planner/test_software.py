"""What was usual when, and what it does to a step."""

from __future__ import annotations

from dataclasses import replace

import pytest

from parallel.planner import software
from parallel.planner.calibration import FITTED
from tests.parallel.planner.test_step_time import planned


@pytest.mark.parametrize(
    ("month", "domain", "experts", "vpp", "fp8", "graphs", "overlaps"),
    [
        (202510, 72, 64, 4, "mxfp8", "none", False),  # before graphs
        (202604, 72, 64, 4, "mxfp8", "scoped", False),
        (202606, 72, 64, 4, "mxfp8", "full", True),
        (202606, 72, 64, 4, None, "scoped", False),  # full graphs came with MXFP8
        (202606, 72, 1, 4, "mxfp8", "none", False),  # no experts
        (202509, 8, 64, 4, "tensor", "none", True),  # experts over nodes
        (202509, 8, 8, 4, "tensor", "none", False),  # experts in one node, too early
        (202602, 8, 8, 4, "tensor", "none", True),
        (202602, 8, 8, 1, "tensor", "none", False),  # one chunk: nothing to overlap with
        (202604, 8, 8, 1, "mxfp8", "scoped", False),
    ],
)
def test_graphs_and_overlap_as_the_published_recipes_set_them(
    month: int, domain: int, experts: int, vpp: int, fp8: str | None, graphs: str, overlaps: bool
) -> None:
    found = software.usual(month, domain, experts, vpp, fp8)
    assert (found.graphs, found.overlap_all_to_all, found.fused_experts) == (graphs, overlaps, graphs == "full")


def test_graphs_take_work_from_the_host() -> None:
    """A step that the host holds up is shorter the more of it graphs start; with a quick host they hardly matter."""

    def seconds(host_us: float, graphs: str) -> float:
        soft = replace(software.of_date(202604), graphs=graphs)
        return planned(soft=soft, constants=replace(FITTED, host_us=host_us)).seconds

    none, scoped, full = (seconds(1000, graphs) for graphs in ("none", "scoped", "full"))
    assert full < 0.8 * scoped < 0.8 * none
    assert seconds(0.1, "scoped") == pytest.approx(seconds(0.1, "none"), rel=0.01)


def test_overlap_costs_the_host_more_where_no_graph_starts_its_pieces() -> None:
    """Where dispatch stays within a node there is little to hide, and the host has more to start."""
    slow, soft = replace(FITTED, host_us=200), software.of_date(202604)
    apart, overlapped = (
        planned("parallel.ep=8", soft=replace(soft, overlap_all_to_all=overlaps), constants=slow).seconds
        for overlaps in (False, True)
    )
    assert overlapped > apart


def test_a_fused_feed_forward_of_experts_moves_less() -> None:
    base = software.of_date(202604)
    plain, fused = (planned(soft=replace(base, fused_experts=fused)).parts for fused in (False, True))
    assert fused["memory"] < plain["memory"]
    assert fused["quantize"] < plain["quantize"]
    assert fused["gemm"] == plain["gemm"]
