"""Which ranks are slow."""

from __future__ import annotations

from moe_train.resilience.stragglers import Judge, Slow

EVEN = (0.4, 0.01, 1.0)
SLOW = (0.9, 0.01, 1.0)
DULL = (0.4, 0.03, 1.0)


def test_a_rank_that_is_slow_several_times_in_a_row_is_named() -> None:
    judge = Judge([0] * 4, ratio=2.0, intervals=2)
    table = [EVEN, EVEN, SLOW, EVEN]
    assert judge.slow(table) == []
    assert judge.slow([EVEN] * 4) == []
    assert judge.slow(table) == []
    assert judge.slow(table) == [Slow(2, "own time of a step", 0.9, 0.4)]
    assert judge.slow(table) == []  # named again after as many intervals


def test_ranks_are_compared_with_their_pipeline_stage() -> None:
    judge = Judge([0, 0, 1, 1], ratio=2.0, intervals=1)
    assert judge.slow([EVEN, EVEN, SLOW, SLOW]) == []
    assert [one.rank for one in judge.slow([EVEN, EVEN, SLOW, EVEN])] == [2]
    assert Judge([0, 1], ratio=2.0, intervals=1).slow([EVEN, SLOW]) == []  # nobody to compare with


def test_the_matrix_product_is_compared_over_all_stages() -> None:
    judge = Judge([0, 1, 2, 3], ratio=2.0, intervals=1)
    assert judge.slow([EVEN, EVEN, EVEN, DULL]) == [Slow(3, "matrix product", 0.03, 0.01)]


def test_what_is_little_in_a_step_does_not_matter() -> None:
    judge = Judge([0, 0, 0], ratio=2.0, intervals=1)
    assert judge.slow([(0.001, 0.01, 1.0), (0.09, 0.01, 1.0), (0.001, 0.01, 1.0)]) == []
