"""The real command path, model=tiny: save after step 10 at tp2 pp2 ep2, continue on other layouts to step 20."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.parity import COMMON
from launch.local import launcher
from moe_train.config.composition.compose import compose
from moe_train.config.composition.validate import validate

SAVED_AT = ["parallel.tp=2", "parallel.pp=2", "parallel.ep=2"]
CONTINUED_AT = {
    "single": [],
    "pp2 vpp2": ["parallel.pp=2", "parallel.vpp=2"],
    "ep4": ["parallel.ep=4"],
    "tp2 dp2": ["parallel.tp=2", "parallel.dp=2"],
}


def train(run_dir: Path, *overrides: str) -> dict[int, dict[str, Any]]:
    """Metrics by step."""
    cfg = compose([*COMMON, "train.steps=20", *overrides, f"run_dir={run_dir}"])
    launcher.start(cfg, validate(cfg))
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line for line in lines if "lm_loss" in line}


@pytest.fixture(scope="module")
def uninterrupted(small_data: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, Any]]:
    """Run directory and metrics of 20 steps with a checkpoint after 10."""
    run_dir = tmp_path_factory.mktemp("run")
    return run_dir, train(run_dir, *small_data, *SAVED_AT, "checkpoint.interval_steps=10")


@pytest.mark.slow
@pytest.mark.parametrize("layout", CONTINUED_AT)
def test_another_layout_goes_on_as_if_nothing_happened(
    layout: str, uninterrupted: tuple[Path, dict[int, Any]], small_data: tuple[str, ...], tmp_path: Path
) -> None:
    """Steps 11-20 within 1e-4, which needs the moments and the data position."""
    run_dir, expected = uninterrupted
    checkpoint = run_dir / "checkpoints" / "step_00000010"
    found = train(tmp_path, *small_data, *CONTINUED_AT[layout], f"resume={checkpoint}")
    assert list(found) == list(range(11, 21))
    for step, line in found.items():
        assert line["lm_loss"] == pytest.approx(expected[step]["lm_loss"], rel=1e-4)
        assert line["grad_norm"] == pytest.approx(expected[step]["grad_norm"], rel=1e-3)


@pytest.mark.slow
def test_the_same_layout_is_bit_identical(
    uninterrupted: tuple[Path, dict[int, Any]], small_data: tuple[str, ...], tmp_path: Path
) -> None:
    """Losses, gradient norms and expert loads, not a bit different."""
    run_dir, expected = uninterrupted
    found = train(tmp_path, *small_data, *SAVED_AT, f"resume={run_dir}/checkpoints/step_00000010")
    for step, line in found.items():
        for key in ("lm_loss", "grad_norm", "expert_load", "lr"):
            assert line[key] == expected[step][key]
