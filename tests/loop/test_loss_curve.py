"""The picture of a run's losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moe_train.loop.callbacks.loss_curve import LossCurve


def _curve(lines: list[dict[str, Any]]) -> LossCurve:
    curve = LossCurve()
    for line in lines:
        curve.add(line)
    return curve


def test_the_picture_has_both_curves_and_the_entropy(tmp_path: Path) -> None:
    lines = [{"step": step, "lm_loss": 9.0 - step / 1000} for step in range(1, 5001)]
    lines += [{"step": 1, "valid_loss": 9.0}, {"step": 5000, "valid_loss": 4.5}, {"step": 3, "event": "bad_step"}]
    assert _curve(lines).draw(tmp_path / "loss.svg", "tiny", entropy=6.0)
    text = (tmp_path / "loss.svg").read_text(encoding="utf-8")
    for word in ("training", "validation", "unigram entropy", "loss (nats per token)", "tiny"):
        assert f">{word}<" in text
    assert len(text) < 200_000, "points are thinned out"
    first = (tmp_path / "loss.svg").read_bytes()
    assert _curve(lines).draw(tmp_path / "loss.svg", "tiny", entropy=6.0)
    assert (tmp_path / "loss.svg").read_bytes() == first


def test_without_a_finite_loss_there_is_no_picture(tmp_path: Path) -> None:
    assert not _curve([{"step": 1, "lm_loss": None}, {"step": 2}]).draw(tmp_path / "loss.svg", "tiny")
    assert not (tmp_path / "loss.svg").exists()
