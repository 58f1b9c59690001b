"""The registry of metrics and events."""

from __future__ import annotations

import pytest

from moe_train.telemetry import registry
from moe_train.telemetry.registry import EVENTS, METRICS, Place


def test_each_name_has_one_row() -> None:
    for rows in (METRICS, EVENTS):
        names = [row.name for row in rows]
        assert len(set(names)) == len(names)
    for row in METRICS:
        assert [
            other.name for other in METRICS if other.matches(row.name.replace("{}", "7").replace("{name}", "book"))
        ] == [row.name]


def test_a_numbered_name_finds_its_row() -> None:
    assert registry.metric("expert_load_imbalance/layer_12").name == "expert_load_imbalance/layer_{}"
    assert registry.metric("valid_loss/my-text_2.5").name == "valid_loss/{name}"
    for name in (
        "valid_loss/",
        "valid_loss/a/b",
        "expert_load_imbalance/layer_",
        "expert_load_imbalance/layer_x",
        "lm_loss_2",
        "lm",
    ):
        with pytest.raises(KeyError, match=name):
            registry.metric(name)
    with pytest.raises(KeyError, match="lm_loss has no row"):
        registry.event("lm_loss")


def test_keys_without_a_row_are_named() -> None:
    assert registry.unregistered({"step": 1, "lm_loss": 2.0, "non_finite": {}}) == []
    assert registry.unregistered({"step": 1, "lm_los": 2.0, "event_": 1}) == ["lm_los", "event_"]
    assert registry.unregistered({"step": 1, "event": "skipped", "reason": ""}) == []
    assert registry.unregistered({"step": 1, "event": "skipped", "why": ""}) == ["skipped.why"]
    assert registry.unregistered({"step": 1, "event": "skip"}) == ["skip"]


def test_a_metric_that_people_read_has_what_is_shown() -> None:
    for row in METRICS:
        if Place.PROGRESS in row.places and row.name != "step":  # "step 3/10" is not a number alone
            assert row.progress.count("{}") == 1, row.name
            assert row.text(0.5)
        else:
            assert not row.progress, row.name
        if Place.LOSS_CURVE in row.places:
            assert row.label.endswith(" loss")
            assert row.unit == "nats per token"


def test_numbers_are_written_for_people() -> None:
    assert registry.metric("lm_loss").text(5.43219) == "5.4322"
    assert registry.metric("lm_loss").text(float("nan")) == "nan"
    assert registry.metric("mfu").text(0.2512) == "25.1%"
    assert registry.metric("tokens_per_s").text(12345.6) == "12,346"
