"""Runs with emulated FP8: they train, and which layouts of ranks leave them as they are on one rank."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest

from bench.parity import LAYOUTS, LOSS_TOLERANCE, compare, measure
from tests.distributed.test_parity import SMALL
from tests.quick import slow_but

BF16 = "precision.dtype=bf16"
RECIPES: dict[str, list[str]] = {
    "block": [BF16, "precision.fp8=block"],
    "tensor": [BF16, "precision.fp8=tensor", "precision.fp8_format=hybrid"],
    "delayed": [BF16, "precision.fp8=delayed", "precision.fp8_format=hybrid"],
    "mxfp8": [BF16, "precision.fp8=mxfp8"],
}


@cache
def reference(data: tuple[str, ...], *overrides: str) -> list[dict[str, Any]]:
    """Metrics of the single rank."""
    return measure([*SMALL, *data, *overrides])


@pytest.mark.parametrize(
    ("recipe", "layout"),
    slow_but(
        [("block", "pp2 vpp2"), ("delayed", "pp2 vpp2"), ("delayed", "ep2"), ("mxfp8", "dp2")],
        [
            ("block", "pp2"),
            ("block", "pp2 vpp2"),
            ("block", "dp2"),
            ("delayed", "pp2 vpp2"),
            ("delayed", "ep2"),
            ("delayed", "dp2"),
            ("tensor", "pp2"),
            ("mxfp8", "dp2"),
        ],
        "-".join,
    ),
)
def test_pipeline_and_data_parallelism_change_nothing(recipe: str, layout: str, small_data: tuple[str, ...]) -> None:
    """Each micro-batch meets whole tensors as on one rank: the same tiles and scales, in multi-token prediction too."""
    overrides = RECIPES[recipe]
    found = measure([*SMALL, *small_data, *overrides, *LAYOUTS[layout]])
    expected = reference(small_data, *overrides)
    first = compare(expected[:2], found[:2])
    assert first["max_relative_loss_difference"] <= 1e-6, first
    # Already without FP8: the last stage adds up its gradient of the shared embedding in bf16 by itself.
    assert first["max_relative_grad_norm_difference"] <= 1e-4, first
    assert first["same_expert_load_at_step_1"]
    assert compare(expected, found)["max_relative_loss_difference"] <= 10 * LOSS_TOLERANCE
    assert all(math.isfinite(line["lm_loss"]) and math.isfinite(line["mtp_loss"]) for line in found)
    assert found[0]["lm_loss"] != reference(small_data, BF16)[0]["lm_loss"], "nothing was rounded to FP8"


def test_expert_parallelism_changes_no_output(small_data: tuple[str, ...]) -> None:
    """An expert then sees tokens of several micro-batches at once. Its outputs are those of one rank, as tiles lie
    along each token; only its weight gradients, whose tiles lie across tokens, are rounded in other company."""
    overrides = RECIPES["block"]
    found = measure([*SMALL, *small_data, *overrides, *LAYOUTS["ep2"]])
    expected = reference(small_data, *overrides)
    first = compare(expected[:1], found[:1])
    assert first["max_relative_loss_difference"] <= LOSS_TOLERANCE / 10, first
    assert first["max_relative_grad_norm_difference"] <= 1e-2, first
    assert first["same_expert_load_at_step_1"]
    assert compare(expected, found)["max_relative_loss_difference"] <= 10 * LOSS_TOLERANCE
