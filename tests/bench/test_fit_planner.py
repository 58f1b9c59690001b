"""The objective of the fit."""

from __future__ import annotations

from math import log
from types import SimpleNamespace
from typing import Any

import pytest

from bench.fit_planner import MARGIN, disorder


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
