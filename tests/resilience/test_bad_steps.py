"""Which steps are bad."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from moe_train.config.resilience import ResilienceConfig
from moe_train.resilience.bad_steps import BadSteps, DivergedError


def judged(steps: list[tuple[float, float | None]], **settings: float) -> list[str]:
    """The judgement of each (loss, gradient norm)."""
    guard = BadSteps(ResilienceConfig(spike_window=3, **settings))
    return [guard.classify(loss, norm, anomaly_on_any_rank=False) for loss, norm in steps]


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


@pytest.mark.parametrize("quantity", ["loss", "norm"])
def test_bad_steps_do_not_enter_the_window(quantity: str) -> None:
    """However many spikes follow each other, the median stays that of the good steps before them, which is 1."""
    values = [1.0, 1.0, 1.0, *[30.0] * 6, 2.1, 1.9, 1.0]
    steps = [(value, 1.0) if quantity == "loss" else (5.0, value) for value in values]
    found = judged(steps, spike_factor=2.0, grad_spike_factor=2.0)
    name = {"loss": "lm_loss", "norm": "grad_norm"}[quantity]
    spikes = [f"{name} is 30, 30 times the median of 3 steps"] * 6 + [f"{name} is 2.1, 2.1 times the median of 3 steps"]
    assert found == ["", "", "", *spikes, "", ""]


def test_neither_value_of_a_bad_step_enters_the_window() -> None:
    """The norm is bad, so the loss of the same step, which is not a spike, does not raise the median of the losses."""
    guard = BadSteps(ResilienceConfig(spike_window=3, spike_factor=2.0))
    for _ in range(3):
        assert guard.classify(1.0, 1.0, anomaly_on_any_rank=False) == ""
    for _ in range(3):
        assert guard.classify(1.9, math.nan, anomaly_on_any_rank=False) == "grad_norm is nan"
        assert guard.classify(1.9, 1.0, anomaly_on_any_rank=True) == "grad_norm is bad on another rank"
    assert guard.classify(2.1, 1.0, anomaly_on_any_rank=False) == "lm_loss is 2.1, 2.1 times the median of 3 steps"


def test_the_window_holds_the_latest_good_steps() -> None:
    """The median follows the run: after 3 steps at 2, a loss of 3.9 is not a spike, and one of 4.1 is."""
    found = judged([(1.0, 1.0)] * 3 + [(2.0, 1.0)] * 3 + [(3.9, 1.0), (4.1, 1.0)], spike_factor=2.0)
    assert found == [""] * 7 + ["lm_loss is 4.1, 2.05 times the median of 3 steps"]


def test_overflows_of_fp16_do_not_fill_the_window_of_norms() -> None:
    steps: list[tuple[float, float | None]] = (
        [(5.0, None)] * 5 + [(5.0, 1.0)] * 2 + [(5.0, 9.0), (5.0, 9.0), (5.0, 19.0)]
    )
    # Norms 1, 1, 9 fill the window: 9 is nine times their median.
    assert judged(steps, grad_spike_factor=2.0)[-2:] == [
        "grad_norm is 9, 9 times the median of 3 steps", "grad_norm is 19, 19 times the median of 3 steps",
    ]  # fmt: skip


def test_a_run_that_diverged_has_an_exit_code_of_its_own() -> None:
    """docs/resilience.md: 5 means that starting again would not help."""
    assert DivergedError("cause", "remedy").exit_code == 5


def test_the_doubt_of_another_rank_counts() -> None:
    guard = BadSteps(ResilienceConfig())
    assert guard.classify(5.0, 1.0, anomaly_on_any_rank=True) == "grad_norm is bad on another rank"
    assert guard.grad_norm_anomaly(math.inf)
    assert not guard.grad_norm_anomaly(1.0)


def test_a_resumed_run_finds_the_same_spikes() -> None:
    settings = ResilienceConfig(spike_window=3, spike_factor=2.0, grad_spike_factor=2.0)
    whole, resumed = BadSteps(settings), BadSteps(settings)
    for loss in (1.0, 1.5, 1.25):
        assert whole.classify(loss, 1.0, anomaly_on_any_rank=False) == ""
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    for loss, norm in ((3.0, 1.0), (1.0, 2.5), (2.4, None), (2.9, 1.0), (3.1, 1.0)):
        found = [guard.classify(loss, norm, anomaly_on_any_rank=False) for guard in (whole, resumed)]
        assert found[0] == found[1]
    assert resumed.state_dict() == whole.state_dict() != {"losses": [], "grad_norms": []}
    resumed.load_state_dict({})  # of a version without
    assert resumed.state_dict() == {"losses": [], "grad_norms": []}


@pytest.mark.parametrize("values", [{"losses": 3}, {"losses": ["1"]}, {"grad_norms": [math.nan]}, {"losses": [True]}])
def test_a_window_that_no_run_writes_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="of the spike window are not numbers"):
        BadSteps(ResilienceConfig()).load_state_dict(values)
