"""The order of layouts, and what the noise of published figures leaves of it."""

from __future__ import annotations

from math import log
from typing import Any

import pytest

from tools.published.ranking import RankedRuns, groups, ranks, reached_by_noise, repeats, spearman


def row(configuration: str, published: float, month: int = 202604, release: str = "26.04") -> dict[str, Any]:
    return {
        "architecture": "tiny", "cluster": "h100", "configuration": configuration, "month": month, "release": release,
        "published_tokens_per_s_per_gpu": published, "predicted_tokens_per_s_per_gpu": 2 * published,
    }  # fmt: skip


def test_rank_correlation_is_spearmans() -> None:
    assert ranks([30, 10, 20, 10]) == [3, 0.5, 2, 0.5]
    assert spearman([1, 2, 3, 4], [10, 20, 30, 40]) == 1
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == -1
    assert spearman([1, 2, 3, 4], [1, 2, 4, 3]) == pytest.approx(0.8)
    assert spearman([1, 1, 1], [1, 2, 3]) == 0


def test_a_layout_counts_by_its_newest_release() -> None:
    rows = [row("a", 1.0), row("b", 2.0), row("c", 3.0), row("a", 9.0, 202602), row("b", 2.2, release="26.04.01")]
    (found,) = groups(rows)
    assert (found.published, found.predicted, found.correlation) == ([1.0, 2.1, 3.0], [2.0, 4.2, 6.0], 1)
    assert groups(rows[:2]) == []


def test_repeats_are_patch_releases_of_one_month() -> None:
    rows = [row("a", 100.0), row("a", 110.0, release="26.04.01"), row("a", 150.0, 202606, "26.06"), row("b", 90.0)]
    assert repeats(rows) == [pytest.approx(log(1.1))]
    assert repeats([row("a", 1.0, release=""), row("a", 2.0, release="")]) == []


def test_layouts_that_lie_closer_than_the_noise_come_into_any_order() -> None:
    near = RankedRuns("tiny", "h100", [100.0, 100.1, 100.2, 100.3], [1.0, 2.0, 3.0, 4.0])
    far = RankedRuns("tiny", "h200", [100.0, 200.0, 400.0, 800.0], [4.0, 3.0, 2.0, 1.0])
    assert reached_by_noise([near, far], [0.0]) == ([1, 1], 1)
    chances, of_all = reached_by_noise([near, far], [0.02, 0.02, 5.0])
    assert chances == [of_all, 1]
    assert of_all == pytest.approx(1 / 24, abs=0.02)  # one of all orders of four
