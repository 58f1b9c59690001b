"""Which ranks are slow."""

from __future__ import annotations

import pytest

from moe_train.resilience.stragglers import Straggler, StragglerDetector

EVEN = (0.4, 0.01, 1.0)
SLOW = (0.9, 0.01, 1.0)
DULL = (0.4, 0.03, 1.0)


def test_a_rank_that_is_slow_several_times_in_a_row_is_named() -> None:
    detector = StragglerDetector([0] * 4, ratio=2.0, intervals=2)
    table = [EVEN, EVEN, SLOW, EVEN]
    assert detector.add_interval(table) == []
    assert detector.add_interval([EVEN] * 4) == []
    assert detector.add_interval(table) == []
    assert detector.add_interval(table) == [Straggler(2, "busy time of a step", 0.9, 0.4)]
    assert detector.add_interval(table) == []  # named again after as many intervals


def test_ranks_are_compared_with_their_pipeline_stage() -> None:
    detector = StragglerDetector([0, 0, 1, 1], ratio=2.0, intervals=1)
    assert detector.add_interval([EVEN, EVEN, SLOW, SLOW]) == []
    assert [one.rank for one in detector.add_interval([EVEN, EVEN, SLOW, EVEN])] == [2]
    assert StragglerDetector([0, 1], ratio=2.0, intervals=1).add_interval([EVEN, SLOW]) == []  # nobody to compare with


def test_the_matrix_product_is_compared_over_all_stages() -> None:
    detector = StragglerDetector([0, 1, 2, 3], ratio=2.0, intervals=1)
    assert detector.add_interval([EVEN, EVEN, EVEN, DULL]) == [Straggler(3, "GEMM", 0.03, 0.01)]


def test_a_rank_is_not_compared_with_itself() -> None:
    """Of two ranks, the one that takes 2.5 times as long as the other is slow; it is 1.4 times the median of both."""
    detector = StragglerDetector([0, 1], ratio=2.0, intervals=1)
    assert detector.add_interval([(0.4, 0.010, 1.0), (0.4, 0.025, 1.0)]) == [Straggler(1, "GEMM", 0.025, 0.010)]
    detector = StragglerDetector([0, 0], ratio=2.0, intervals=1)
    assert detector.add_interval([(0.2, 0.01, 1.0), (0.5, 0.01, 1.0)]) == [
        Straggler(1, "busy time of a step", 0.5, 0.2)
    ]


@pytest.mark.parametrize("step_s", [0.1, 1.0, 20.0])
def test_what_is_little_in_a_step_does_not_matter(step_s: float) -> None:
    """A tenth of the time of a step beyond the median is the least that counts, however long a step is."""
    usual = (0.001 * step_s, 0.01, step_s)
    detector = StragglerDetector([0, 0, 0], ratio=2.0, intervals=1)
    assert detector.add_interval([usual, (0.100 * step_s, 0.01, step_s), usual]) == []
    assert [one.rank for one in detector.add_interval([usual, (0.102 * step_s, 0.01, step_s), usual])] == [1]
