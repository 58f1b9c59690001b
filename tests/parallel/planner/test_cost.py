"""Money, energy, failures; groups on the network."""

from __future__ import annotations

from dataclasses import replace

import pytest

from parallel.layout import ParallelLayout
from parallel.planner import cost
from parallel.planner.hardware import Hardware
from parallel.planner.network import Group
from parallel.planner.placement import groups_of, members
from tools.published.clusters import hardware_of

H800: Hardware = hardware_of("h800")


def test_the_published_bill_of_pre_training() -> None:
    """2.664M H800-hours at $2 (arXiv 2412.19437, table 1) on 2,048 GPUs."""
    bill = cost.estimate_cost(H800, "pre-training", 2.664e6, 2048, 14.8e12)
    assert bill.dollars == pytest.approx(5.328e6)
    assert bill.days == pytest.approx(54.2, rel=0.01)
    assert bill.kwh == pytest.approx(2.664e6 * 1.275 * 1.2)
    assert bill.kg_co2 == pytest.approx(bill.kwh * 0.58)
    assert cost.gpu_hours(14.8e12, 1543.2) == pytest.approx(2.664e6, rel=0.001)


def test_idle_gpus_are_paid_for_and_take_no_energy() -> None:
    full, half = (cost.estimate_cost(H800, "pre-training", 1e6, 2048, busy=busy) for busy in (1.0, 0.5))
    assert half.kwh == full.kwh / 2
    assert half.kg_co2 == full.kg_co2 / 2
    assert (half.dollars, half.days) == (full.dollars, full.days)


def test_llama_3_failed_as_often_as_published() -> None:
    """419 stops in 54 days on 16,384 GPUs (arXiv 2407.21783, table 5)."""
    assert 54 * cost.failures_per_day(hardware_of("h100"), 16384) == pytest.approx(419, rel=0.01)


def test_goodput_of_a_job_that_one_can_count() -> None:
    """100 s of saving for 1,000 GPUs, 10 stops a day: sqrt(2 x 100 x 86,400 / 10) s between checkpoints; a stop costs
    the restart of 300 s and half an interval with its save."""
    one = replace(H800, storage_gb_per_s_per_gpu=0.1, gpu_days_between_failures=100.0, restart_s=300.0)
    found = cost.goodput(one, 10e12, 1000)
    assert (found.save_s, found.failures_per_day) == (pytest.approx(100.0), pytest.approx(10.0))
    assert found.interval_s == pytest.approx(1314.534, abs=1e-3)
    # 1,314.534 of 1,414.534 s compute, and each day 10 x (300 + 707.267) s are lost for 86,400 s that are not.
    assert found.fraction == pytest.approx(1314.534 / 1414.534 / (1 + 10072.67 / 86400), rel=1e-6)
    assert cost.best_interval(100.0, 0.0) == 24 * 3600
    assert cost.best_interval(5000.0, 1000.0) == 5000.0  # not less than a checkpoint takes


def test_the_best_interval_is_the_best() -> None:
    size, gpus = 8e12, 16384
    best = cost.goodput(H800, size, gpus)
    for factor in (0.3, 0.7, 1.5, 3):
        assert cost.goodput(H800, size, gpus, best.interval_s * factor).fraction < best.fraction
    assert 0.9 < best.fraction < 1


def test_more_failures_and_more_gpus_cost_goodput() -> None:
    size = 8e12
    flaky = replace(H800, gpu_days_between_failures=200.0)
    assert cost.goodput(flaky, size, 2048).fraction < cost.goodput(H800, size, 2048).fraction
    assert cost.goodput(H800, size, 131072).fraction < cost.goodput(H800, size, 2048).fraction


LAYOUTS = [
    ParallelLayout(2, 2, 1, 2, 4, 1, 4),
    ParallelLayout(1, 4, 1, 1, 8, 1, 16),
    ParallelLayout(4, 2, 1, 1, 2, 2, 4),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["tp", "cp", "dp", "pp", "ep", "etp", "edp"])
def test_groups_are_those_of_the_coordinates(layout: ParallelLayout, kind: str) -> None:
    """Members differ in their own coordinate and in no other of the same counting."""
    dense, expert = ("tp", "cp", "dp", "pp"), ("etp", "ep", "edp", "pp")
    others = [name for name in (dense if kind in dense else expert) if name != kind]
    places = [[getattr(layout.coordinates(rank), name) for name in others] for rank in range(layout.world_size)]
    for rank in range(layout.world_size):
        expected = [other for other in range(layout.world_size) if places[other] == places[rank]]
        assert list(members(layout, kind, rank)) == expected


def test_an_expert_group_spans_the_nodes_that_deepseek_says() -> None:
    """EP64 over 8 nodes (arXiv 2412.19437, section 3.2)."""
    layout = ParallelLayout(1, 16, 1, 1, 64, 1, 128)
    assert groups_of(layout)["ep"].domains(H800) == 8
    assert groups_of(layout)["ep"].domains(hardware_of("gb200")) == 1
    assert Group(4096, 1).crosses_pods(H800)
    assert not Group(2048, 1).crosses_pods(H800)
