"""What a state.json may say of a run."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import pytest

from moe_train.formats import state_file
from moe_train.run import TrainState

STATE: dict[str, Any] = {
    "format": 2, "progress": {"step": 3, "consumed_samples": 12, "consumed_tokens": 192}, "trained_samples": 12,
    "optimizer_updates": 1, "schedule": {"num_steps": 2, "warmup": None}, "layout": {"tp": 2, "dp": 1},
    "device": "cpu", "seed": 1234,
    "loss_scale": {"dense": {"scale": 65536.0, "growth_tracker": 7, "hysteresis_tracker": 2}, "expert": {}},
}  # fmt: skip


def changed(path: str, value: Any) -> dict[str, Any]:
    """The state with another value; ... removes it."""
    first, _, rest = path.partition(".")
    inside = dict(STATE)
    place = inside
    if rest:
        place = inside[first] = dict(inside[first])
        first = rest
    place[first] = value
    if value is ...:
        del place[first]
    return inside


def test_what_a_run_writes_is_read() -> None:
    found = state_file.parse(STATE)
    assert (found.step, found.consumed_samples, found.consumed_tokens, found.trained_samples) == (3, 12, 192, 12)
    assert (found.optimizer_updates, found.schedule_steps) == (1, 2)
    assert (found.device, found.layout) == ("cpu", {"tp": 2, "dp": 1})
    assert found.loss_scale == STATE["loss_scale"]
    assert state_file.parse(changed("trained_samples", ...)).trained_samples is None
    assert state_file.parse(changed("optimizer_updates", ...)).optimizer_updates == 2  # an earlier version's
    assert state_file.position(STATE) == (3, 192, 2)
    overflowed = {"scale": 32768.0, "growth_tracker": 0, "hysteresis_tracker": -1}
    assert state_file.parse(changed("loss_scale.dense", overflowed)).loss_scale["dense"] == overflowed


def test_an_earlier_version_finds_no_count_in_progress_that_it_does_not_know() -> None:
    """It refuses unknown ones, and ignores what follows `progress`."""
    written = state_file.counts_of_run(asdict(TrainState(3, 12, 192, 12, 2)))
    assert written == {
        "progress": {"step": 3, "consumed_samples": 12, "consumed_tokens": 192},
        "trained_samples": 12,
        "optimizer_updates": 2,
    }
    found = state_file.parse(STATE | written)
    assert (found.step, found.trained_samples, found.optimizer_updates) == (3, 12, 2)


@pytest.mark.parametrize("value", [..., None, True, -1, 1.0, math.inf, 1 << 62, "1", [], {}])
@pytest.mark.parametrize(
    "path",
    ["progress.step", "progress.consumed_samples", "progress.consumed_tokens", "schedule.num_steps", "layout.tp"],
)
def test_counts_are_whole_numbers(path: str, value: Any) -> None:
    if path == "layout.tp" and value is ...:
        return  # any layout may have written it
    with pytest.raises(ValueError, match=r"is not a count"):
        state_file.parse(changed(path, value))


@pytest.mark.parametrize(
    ("path", "value"),
    [(name, value) for name in ("progress", "schedule", "layout", "loss_scale") for value in (..., None, 3, [])]
    + [("device", ...), ("device", 1), ("progress.more", 1), ("trained_samples", -1),
       *(("optimizer_updates", value) for value in (None, True, -1, 1.0, 1 << 62, "1")), ("loss_scale.dense", 1),
       ("loss_scale.dense", {"scale": 1.0}),
       ("loss_scale.dense", {"scale": 0.0, "growth_tracker": 0, "hysteresis_tracker": 0}),
       ("loss_scale.dense", {"scale": "x", "growth_tracker": 0, "hysteresis_tracker": 0}),
       ("loss_scale.dense", {"scale": 1.0, "growth_tracker": math.nan, "hysteresis_tracker": 0})],
)  # fmt: skip
def test_what_no_run_writes_is_refused(path: str, value: Any) -> None:
    with pytest.raises(ValueError, match=r"it has no|progress has|is not a count|loss_scale"):
        state_file.parse(changed(path, value))
