"""`make bench-step` says what is missing, compares the same models, and sums up what it measured."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import bench_step, step_grouped, step_profile, step_transformers
from bench.step_data import StepTask
from bench.step_workers import OURS, prepare
from bench.workers import Worker
from moe_train.model.kernels.cpu_kernels import uneven_counts
from parallel.errors import HardwareError


def test_missing_transformers_is_one_line_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(HardwareError, match=r"transformers, which is not installed; install it: .*pip install"):
        step_transformers.require()


def test_summary_takes_the_faster_variant_and_every_loss() -> None:
    steps = [(2.0, 9.0)] * bench_step.WARM_UP_STEPS + [(2.0, 1.0), (2.0, 3.0), (2.0, 2.0)]
    off = [(2.0 * 1.001, time / 4) for _, time in steps]
    reference = [loss for loss, _ in steps]
    task = StepTask("fp32", 8, 256, 2)
    rows = [bench_step.row(side, task, taken, reference, 0.5) for side, taken in
            ((OURS, steps), ("eager", steps), ("grouped_mm", off))]  # fmt: skip
    assert rows[0]["tokens_per_s"] == 2048 / 2.0
    assert rows[0]["tflops"] == pytest.approx(50.48e-3 / 2.0, rel=1e-3)
    summary = bench_step.summarise(rows)
    assert summary["ratio_fp32"] == pytest.approx(0.25)
    assert summary["fraction_of_gemm_peak"] == pytest.approx(rows[0]["tflops"] / 0.5)
    assert not summary["losses_agree"]
    assert bench_step.summarise(rows[:2])["losses_agree"]


@pytest.mark.parametrize(("at", "by", "agree"), [(9, 5e-4, False), (10, 5e-4, True), (10, 5e-3, False)])
def test_losses_of_later_steps_may_differ_more(at: int, by: float, agree: bool) -> None:
    reference = [2.0] * 12
    steps = [(2.0 * (1 + by * (number == at)), 1.0) for number in range(12)]
    row = bench_step.row(OURS, StepTask("fp32", 8, 256, 2), steps, reference, 0.5)
    assert bench_step.summarise([row, {**row, "side": "eager"}])["losses_agree"] is agree


@pytest.mark.slow
def test_both_sides_start_from_the_same_weights_and_stay_together(tmp_path: Path) -> None:
    """The losses of two real steps, also where our experts are stored one by one."""
    pytest.importorskip("transformers", reason="the extra hf is not installed")
    losses = []
    for number, (side, overrides) in enumerate(
        [(OURS, ()), ("grouped_mm", ()), (OURS, ("backend.grouped_gemm=false",)), ("eager", ())]
    ):
        worker = Worker(prepare, side, StepTask("fp32", 2, 32, 1, overrides=overrides), tmp_path / f"{number // 2}.pt")
        losses.append([loss for loss, _ in worker.ask("steps", 2)])
        worker.stop()
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=1e-5)
    assert losses[0][0] != losses[0][1]


def test_the_profile_finds_every_part_of_a_step_and_leaves_nothing_out(tmp_path: Path) -> None:
    worker = Worker(prepare, OURS, StepTask("bf16", 2, 32, 1), tmp_path / "weights.pt")
    parts, operations = worker.ask("profile", 1)
    after = worker.ask("steps", 1)
    worker.stop()
    shares = {one["part"]: one["share"] for one in parts}
    assert set(shares) == set(step_profile.PARTS)
    assert sum(shares.values()) == pytest.approx(1)
    assert shares[step_profile.OTHER] < 0.5
    assert {"aten::mm", "aten::_fused_adamw_"} <= {one["operation"] for one in operations}
    assert after[0][0] > 0  # nothing of the profiler stays in the step


def test_a_backward_operation_belongs_where_its_forward_one_does() -> None:
    def event(name: str, parent: Any = None, number: int = -1) -> Any:
        return SimpleNamespace(name=name, cpu_parent=parent, sequence_nr=number)

    norm = event("part: norm", event("part: router and dispatch"))
    node = event("autograd::engine::evaluate_function: MulBackward0", None, 7)
    assert step_profile.part_of(event("aten::mul", norm, 7), {}) == step_profile.NORM
    assert step_profile.part_of(event("aten::mul", event("MulBackward0", node, 7)), {7: "norm"}) == step_profile.NORM
    assert step_profile.part_of(event("aten::mm", norm), {}) == step_profile.GEMM
    assert step_profile.part_of(event("aten::mm", event("GroupedLinearBackward", node)), {}) == step_profile.GROUPED
    assert step_profile.part_of(event("aten::fill_"), {}) == step_profile.OTHER


def test_grouped_products_are_compared_on_the_same_numbers_and_ever_new_counts() -> None:
    """Both sides of every product give the same, for counts that add up and change."""
    rng = random.Random(0)
    counts = [uneven_counts(96, 8, rng) for _ in range(2)]
    assert [sum(each) for each in counts] == [96, 96]
    assert counts[0] != counts[1]
    for ours, theirs in step_grouped._products(torch.float32, 96, 8, 32, 64).values():
        torch.testing.assert_close(ours(counts[0]), theirs(counts[0]))
