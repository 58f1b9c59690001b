"""Which steps are bad."""

from __future__ import annotations

import math

import pytest

from moe_train.config.resilience import ResilienceConfig
from moe_train.resilience.bad_steps import BadSteps


def judged(steps: list[tuple[float, float | None]], **settings: float) -> list[str]:
    """The judgement of each (loss, gradient norm)."""
    guard = BadSteps(ResilienceConfig(spike_window=3, **settings))
    return [guard.judge(loss, norm, doubted=False) for loss, norm in steps]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_bad(value: float) -> None:
    assert judged([(value, 1.0), (5.0, value)]) == [f"lm_loss is {value}", f"grad_norm is {value}"]


def test_an_overflow_of_fp16_is_not_bad() -> None:
    assert judged([(5.0, None)] * 20) == [""] * 20


def test_without_a_factor_nothing_is_a_spike() -> None:
    assert judged([(5.0, 1.0)] * 5 + [(5e6, 1e6)]) == [""] * 6


def test_a_spike_is_far_above_the_median_of_a_full_window() -> None:
    steps: list[tuple[float, float | None]] = [(5.0, 1.0), (50.0, 9.0), (5.0, 1.0), (9.9, 1.0), (10.1, 1.0), (5.0, 2.1)]
    found = judged(steps, spike_factor=2.0, grad_spike_factor=2.0)
    # Before three steps were seen there is no median; a bad step is not part of the next one.
    assert found == ["", "", "", "", "", "grad_norm is 2.1, 2.1 times the median of 3 steps"]
    found = judged([(5.0, 1.0)] * 3 + [(10.1, 1.0), (10.0, 1.0)], spike_factor=2.0)
    assert found == ["", "", "", "lm_loss is 10.1, 2.02 times the median of 3 steps", ""]


def test_the_doubt_of_another_rank_counts() -> None:
    guard = BadSteps(ResilienceConfig())
    assert guard.judge(5.0, 1.0, doubted=True) == "grad_norm is bad on another rank"
    assert guard.doubt(math.inf)
    assert not guard.doubt(1.0)
