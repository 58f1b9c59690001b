"""The line about memory at the start of a run, and what the first steps measure."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.parity import COMMON
from launch.local import launcher
from moe_train.config.composition.compose import compose
from moe_train.config.composition.validate import validate
from moe_train.loop.callbacks import profiler
from moe_train.loop.callbacks.profiler import PARTS, MemoryForecast
from moe_train.model.memory import predict, workload_of
from parallel.layout import ParallelLayout
from parallel.planner.memory import saved_per_micro_batch
from tests.distributed.helper import run_distributed
from tests.loop.fake_run import fake_run


def test_rank_0_says_what_the_fullest_rank_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = fake_run(tmp_path)
    MemoryForecast().on_start(run)
    (line,) = capsys.readouterr().out.splitlines()
    (stage,) = predict(run.cfg, run.layout)
    assert line.startswith(f"memory of a rank, predicted: {stage.total / 2**20:,.0f} MiB (weights, gradients and")
    MemoryForecast().on_start(fake_run(tmp_path, rank=1))
    run.cfg.telemetry.progress = False
    MemoryForecast().on_start(run)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("precision", ["fp32", "fp8_block"])
def test_first_steps_have_what_was_measured(precision: str, tmp_path: Path, small_data: tuple[str, ...]) -> None:
    """Through the real command path, on two stages; the third step is not measured. Emulated FP8 keeps 16 bits."""
    small = ["model.hidden_size=64", "model.ffn_hidden_size=128", "model.vocab_size=512", "train.seq_length=32"]
    steps = ["train.steps=3", "schedule.warmup_steps=1", "telemetry.profile_memory_steps=2"]
    cfg = compose(
        [*COMMON, *small, *small_data, *steps, "parallel.pp=2", f"precision={precision}", f"run_dir={tmp_path}/run"]
    )
    layout = validate(cfg)
    launcher.start(cfg, layout)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [set(PARTS) <= set(line) for line in lines] == [True, True, False]
    for line in lines[:2]:
        for stage, memory in enumerate(predict(cfg, layout)):
            predicted = saved_per_micro_batch(workload_of(cfg, layout), stage)
            assert line["saved_activation_bytes"][stage] == pytest.approx(predicted, rel=0.01)
            static = [line[name][stage] for name in PARTS[1:]]
            assert static == [memory.parameters, memory.gradients, memory.optimizer]


def by_stage(degrees: dict[str, int]) -> dict[str, list[int]]:
    """What is shown where rank 0 has 10, 20, 30, 40 bytes of each part and rank 1 three times as many."""
    rank = torch.distributed.get_rank()
    degrees = dict.fromkeys(("tp", "pp", "vpp", "cp", "ep", "etp"), 1) | degrees
    layout = ParallelLayout.resolve(**degrees, world_size=2)
    run: Any = SimpleNamespace(layout=layout, rank=SimpleNamespace(rank=rank), device="cpu")
    return profiler._by_stage(run, [(1 + 2 * rank) * value for value in (10, 20, 30, 40)])


def test_ranks_of_a_stage_are_averaged_and_stages_are_not() -> None:
    together, apart = (run_distributed(by_stage, 2, degrees) for degrees in ({"ep": 2}, {"pp": 2}))
    assert together == [dict(zip(PARTS, ([20], [40], [60], [80]), strict=True))] * 2
    assert apart == [dict(zip(PARTS, ([10, 30], [20, 60], [30, 90], [40, 120]), strict=True))] * 2
