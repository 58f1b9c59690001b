"""The objective of the fit."""

from __future__ import annotations

from dataclasses import replace
from math import log
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from bench.fit_planner import BOUNDS, EXTENSION_HOURS, MARGIN, at, disorder, extension_hours, limits
from moe_train.config.composition.compose import compose
from moe_train.config.composition.validate import validate
from moe_train.config.roots import PlanRoot
from moe_train.model.memory import weights_of, workload_of
from parallel.planner.calibration import FITTED
from tests.parallel.planner.test_step_time import V3
from tools.published.clusters import hardware_of


def case(layout: str, published: float, model: str = "m", month: int = 202601) -> Any:
    row = SimpleNamespace(
        model=SimpleNamespace(name=model), hardware=SimpleNamespace(name="h100"), configuration=layout, month=month
    )
    return SimpleNamespace(row=row, published=published)


def test_layouts_in_the_published_order_cost_nothing() -> None:
    cases = [case("a", 100), case("b", 110), case("c", 130)]
    assert disorder(cases, [0.0, 0.0, 0.0]) == 0
    assert disorder(cases, [0.3, 0.3, 0.3]) == 0  # all too optimistic, in the right order


def test_layouts_in_another_order_cost_what_they_lack() -> None:
    cases = [case("a", 100), case("b", 110), case("c", 500, "other")]
    wrong = disorder(cases, [log(1.2), 0.0, 0.0])
    assert wrong == pytest.approx(MARGIN + log(120 / 110))  # one pair, in the one group that has two layouts


def test_releases_of_a_layout_count_once() -> None:
    cases = [case("a", 100), case("b", 110), case("b", 110), case("b", 110)]
    assert disorder(cases, [0.0, 0.0, 0.0, -1.0]) == 0


def test_only_the_newest_release_of_a_layout_counts() -> None:
    cases = [case("a", 100), case("b", 90, month=202509), case("b", 110)]
    assert disorder(cases, [0.0, 9.0, 0.0]) == 0
    assert disorder(cases, [0.0, 0.0, -1.0]) > 0


def test_a_point_outside_its_bounds_is_brought_within() -> None:
    low, high = limits()
    below, above = at(low - 1), at(high + 1)
    for name, (least, most) in BOUNDS.items():
        assert getattr(below, name) == pytest.approx(least)
        assert getattr(above, name) == pytest.approx(most)


def test_what_is_fused_once_stays_fused() -> None:
    point = np.log([getattr(FITTED, name) for name in BOUNDS])
    point[list(BOUNDS).index("expert_passes_2026")] = log(3)
    point[list(BOUNDS).index("expert_passes_2025")] = log(2)
    assert at(point).expert_passes_2026 == pytest.approx(2)


def test_the_fit_counts_the_stages_of_the_published_context_extension() -> None:
    """As the planner itself does (test_plan.py), within what the published hours allow."""
    cfg = compose([*V3, "batch=large", "plan=deepseek_v3"], PlanRoot)
    workload = replace(workload_of(cfg, validate(cfg)), micro_batches=120)
    row = SimpleNamespace(schedule="dualpipe", hardware=hardware_of("h800"), cfg=cfg, plan=cfg.plan)
    found: Any = SimpleNamespace(row=row, workload=workload, weights=weights_of(cfg.model, workload))
    assert extension_hours(found, FITTED) == pytest.approx(EXTENSION_HOURS, rel=0.05)
    slow = replace(FITTED, attention_speed=FITTED.attention_speed / 2)
    assert extension_hours(found, slow) > 1.5 * extension_hours(found, FITTED)
