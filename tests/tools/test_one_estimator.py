"""moe-submit, moe-plan and `moe-plan validate` have one estimator: the same run takes the same time in all of them."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from launch.slurm import submit
from launch.slurm.estimate import run_estimate
from moe_train.config.composition.compose import compose
from moe_train.config.composition.validate import validate
from moe_train.config.plan import PlanConfig, TrainingStage
from moe_train.config.roots import PlanRoot
from moe_train.config.schema import RecomputeConfig
from moe_train.config.walk import all_fields, get, with_values
from parallel.suggest import override_value
from tools.planning.answer import Answer, answer
from tools.published.predict import Prediction, predict
from tools.published.rows import Row
from tools.published.table import TABLE
from tools.published.validation import read

CLOSE = 1e-3
GROUPS = ("model.", "cluster.", "parallel.", "precision.", "recompute.", "batch.", "plan.")
# Rows of the published table, by what they have.
ROWS = {
    "H800, block FP8, DeepSeek's software and schedule": 0,
    "GB300, MXFP8, flex, scoped graphs, overlap": 8,
    "GB200, MXFP8, no overlap": 9,
    "GB200, BF16, scoped graphs": 10,
    "H100, block FP8, overlap": 11,
    "H100, BF16, flex, scoped graphs": 13,
    "GB300, MXFP8, as usual": 14,
    "GB200, MXFP8, alltoall, 2025": 20,
    "GB200, MXFP8, scoped graphs, 2025": 25,
    "LoRA": 99,
    "GB300, FSDP": 103,
    "B200, tokens dropped": 241,
    "H100, BF16, alltoall": 257,
    "H100, learned routing": 261,
    "A100, 2021, scores in memory": 296,
    "FSDP2 with torch's attention and loss": 334,
}


@cache
def rows() -> list[Row]:
    understood = [row for _, row in read(TABLE)]
    assert len(understood) == 360
    return [row if isinstance(row, Row) else None for row in understood]  # type: ignore[misc]


def as_fields(row: Row, prediction: Prediction) -> list[str]:
    """The run of a row as overrides of single fields, with what the predictor chose of what is not published."""
    chosen, layout = prediction.workload, prediction.workload.layout
    recompute = row.cfg.recompute
    if row.open_recompute:
        recompute = RecomputeConfig(mode=chosen.recompute, modules=sorted(chosen.recompute_modules))
    positions = max(row.model.max_position_embeddings, row.cfg.train.seq_length)
    known = {name: get(row.cfg, name) for name in all_fields()}
    cfg = replace(
        with_values(PlanRoot(plan=PlanConfig(**vars(row.plan), search=False)), known),
        model=replace(row.model, max_position_embeddings=positions),
        recompute=recompute,
        parallel=replace(row.cfg.parallel, vpp=layout.vpp),
    )
    names = [name for name in all_fields(PlanRoot) if name.startswith(GROUPS)]
    words = [f"{name}={override_value(get(cfg, name))}" for name in (*names, "train.seq_length")]
    return ["runtime=cuda", "data=indexed", *words]


@pytest.mark.parametrize("index", ROWS.values(), ids=list(ROWS))
def test_a_published_run_takes_the_same_time_in_every_command(index: int) -> None:
    """Whatever a row of the table says is a field that a user can set."""
    row = rows()[index]
    prediction = predict(row)
    cfg = compose(as_fields(row, prediction), PlanRoot)
    layout = validate(cfg, row.layout.world_size, trains=False)
    planned = answer(cfg, layout)
    submitted = run_estimate(cfg, layout, cfg.plan).pace
    assert submitted is not None
    assert planned.best.step.seconds == pytest.approx(prediction.step.seconds, rel=CLOSE)
    assert submitted.step_s == pytest.approx(prediction.step.seconds, rel=CLOSE)
    assert planned.best.memory_bytes == pytest.approx(prediction.memory_bytes, rel=CLOSE)


V3 = ("model=deepseek_v3", "parallel=deepseek_v3_h800", "recompute=deepseek_v3", "batch=large",
      "train.seq_length=4096", "runtime=cuda", "data=indexed", "plan.search=false")  # fmt: skip
CHANGES = {
    "H800, BF16": ["cluster=h800", "precision=bf16"],
    "H800, block FP8, flex": ["cluster=h800", "precision=fp8_block", "parallel.dispatcher=flex"],
    "H800, imbalance": ["cluster=h800", "precision=bf16", "plan.imbalance=1.5"],
    "H800, interleaved": ["cluster=h800", "precision=bf16", "parallel.vpp=2", "batch.global_batch_size=16384"],
    "H100, learned routing": ["cluster=h100", "precision=fp8_block", "plan.imbalance=null"],
    "GB200, MXFP8": ["cluster=gb200", "precision=mxfp8"],
    "GB200, MXFP8, 2026.06": ["cluster=gb200", "precision=mxfp8", "plan.software_date=202606"],
    "GB200, no graphs": ["cluster=gb200", "precision=bf16", "plan.cuda_graphs=none"],
    "GB300, full graphs, flex": ["cluster=gb300", "precision=mxfp8", "plan.cuda_graphs=full",
                                 "parallel.dispatcher=flex"],
    "GB300, FSDP": ["cluster=gb300", "precision=bf16", "plan.fsdp=true"],
}  # fmt: skip


def planned(*words: str) -> tuple[PlanRoot, Answer]:
    cfg = compose([*V3, *words], PlanRoot)
    return cfg, answer(cfg, validate(cfg, trains=False))


@pytest.mark.parametrize("words", CHANGES.values(), ids=list(CHANGES))
def test_a_layout_takes_the_same_time_in_moe_plan_and_moe_submit(words: list[str]) -> None:
    cfg, result = planned(*words)
    submitted = run_estimate(cfg, validate(cfg), cfg.plan).pace
    assert submitted is not None
    assert submitted.step_s == pytest.approx(result.best.step.seconds, rel=CLOSE)


def test_what_plan_says_of_the_software_changes_the_time() -> None:
    """Every change on its own; none of them is lost on the way to moe-submit."""
    base = ["cluster=gb200", "precision=mxfp8", "parallel.tp=2", "parallel.dp=64"]

    def seconds(*words: str) -> float:
        cfg = compose([*V3, *base, *words], PlanRoot)
        found = run_estimate(cfg, validate(cfg), cfg.plan).pace
        assert found is not None
        return found.step_s

    usual = seconds()
    changes = ["plan.imbalance=1.5", "plan.imbalance=null", "plan.software_date=202606", "plan.cuda_graphs=none",
               "parallel.dispatcher=flex", "plan.overlap_tp=false", "plan.attention_kernel=flash2",
               "plan.attention_kernel=unfused", "plan.fsdp=true", "plan.frozen_weights=true",
               "plan.software=deepseek"]  # fmt: skip
    times = {change: seconds(change) for change in changes}
    assert [change for change, time in times.items() if time == usual] == []


def test_stages_of_a_recipe_take_the_time_of_runs_of_their_own() -> None:
    """Pre-training and two context extensions, each also asked for alone."""
    recipe = [
        TrainingStage("first", tokens=14_800_000_000_000),
        TrainingStage("to 32K", steps=1000, seq_length=32768, global_batch_size=1920, cp=8),
        TrainingStage("to 128K", steps=1000, seq_length=131072, global_batch_size=480, cp=32),
    ]
    cfg, result = planned("cluster=gb300", "precision=mxfp8", f"plan.recipe={override_value(recipe)}")
    assert run_estimate(cfg, validate(cfg), cfg.plan).pace.step_s == pytest.approx(result.best.step.seconds, rel=CLOSE)  # type: ignore[union-attr]
    stages = result.plans_of_stages
    assert list(stages) == ["first", "to 32K", "to 128K"]
    for stage in list(stages.values())[1:]:
        workload = stage.workload
        own = compose([
            *V3, "cluster=gb300", "precision=mxfp8", f"parallel.cp={workload.layout.cp}",
            f"parallel.dp={workload.layout.dp}", f"train.seq_length={workload.seq_length}",
            f"model.max_position_embeddings={workload.seq_length}",
            f"batch.global_batch_size={workload.micro_batches * workload.layout.dp}",
            f"recompute.mode={workload.recompute}", f"recompute.modules={sorted(workload.recompute_modules)}",
        ], PlanRoot)  # fmt: skip
        pace = run_estimate(own, validate(own), own.plan).pace
        assert pace is not None
        assert pace.step_s == pytest.approx(stage.step.seconds, rel=CLOSE)


def test_a_dry_run_prints_the_time_of_moe_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The words of a command line, and what it prints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")  # no Slurm
    words = [*V3, "cluster=gb200", "precision=mxfp8", "plan.software_date=202606", "plan.imbalance=1.2"]
    given = ["data.dir=later", f"run_dir={tmp_path}/run", "train.steps=10", "optimizer.lr=1e-4"]
    submitted = [word for word in words if not word.startswith("plan.search=")]  # a question to moe-plan alone
    assert submit.run(["--dry-run", *submitted, *given]) == 0
    printed = re.search(r"a step ([\d.,]+) s, ", capsys.readouterr().out)
    assert printed is not None
    _, result = planned(*words)
    assert float(printed[1].replace(",", "")) == pytest.approx(result.best.step.seconds, rel=CLOSE)
