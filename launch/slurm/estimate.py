"""What a job will need before it runs: memory of the fullest rank, and hours. No torch import."""

from __future__ import annotations

from dataclasses import dataclass, replace

from moe_train.config.composition.validate import total_steps
from moe_train.config.resolve import batch_schedule
from moe_train.config.schema import Config
from moe_train.model.arithmetic import flops_per_token
from moe_train.model.memory import job_of, predict, weights_on
from parallel.errors import ConfigError
from parallel.layout import ParallelLayout
from parallel.planner import software
from parallel.planner.calibration import FITTED
from parallel.planner.hardware import Hardware
from parallel.planner.layer_time import Machine
from parallel.planner.step_time import plan_step

GIB = 2**30


@dataclass(frozen=True)
class Pace:
    """How fast a run is on the GPUs of `cluster`, and its hours. `mfu` counts causal attention as such."""

    step_s: float
    tokens_per_s_per_gpu: float
    mfu: float
    hours: float


@dataclass(frozen=True)
class Estimate:
    """Args:
    stage, memory_gib, usable_gib: the fullest pipeline stage, and what a GPU has for it; None on CPU nodes.
    tokens: of the whole run.
    pace: None on CPU nodes.
    """

    stage: int
    memory_gib: float
    usable_gib: float | None
    tokens: int
    pace: Pace | None


def estimate(cfg: Config, layout: ParallelLayout) -> Estimate:
    """From a validated config."""
    fullest = max(predict(cfg, layout), key=lambda stage: stage.total)
    tokens = batch_schedule(cfg).samples_after(0, total_steps(cfg)) * cfg.train.seq_length
    gpus = cfg.runtime != "cpu"
    return Estimate(
        stage=fullest.stage,
        memory_gib=fullest.total / GIB,
        usable_gib=Hardware.of(cfg.cluster).usable_bytes / GIB if gpus else None,
        tokens=tokens,
        pace=pace(cfg, layout, tokens) if gpus else None,
    )


def pace(cfg: Config, layout: ParallelLayout, tokens: int) -> Pace:
    """From the planner's model of a step of this layout, with the dispatcher that the config names.

    NVFP4 is timed as MXFP8, which is slower.
    """
    hardware, job = Hardware.of(cfg.cluster), job_of(cfg, layout)
    if cfg.precision.fp4:
        job = replace(job, fp8="mxfp8")
    dispatcher = "flex" if cfg.parallel.dispatcher == "flex" else "alltoall"
    machine = Machine(hardware, replace(software.of_date(cfg.plan.software_date), dispatcher=dispatcher), FITTED)
    weights = [weights_on(cfg, job, stage) for stage in range(layout.pp)]
    step = plan_step(job, machine, "interleaved" if layout.vpp > 1 else "1f1b", weights)
    flops = flops_per_token(cfg.model, cfg.train.seq_length)
    return Pace(
        step_s=step.seconds,
        tokens_per_s_per_gpu=step.tokens_per_s_per_gpu,
        mfu=step.tokens_per_s_per_gpu * flops / (hardware.bf16_tflops * 1e12),
        hours=tokens / step.tokens_per_s_per_gpu / layout.world_size / 3600,
    )


def check_memory(found: Estimate, layout: ParallelLayout, where: str = "") -> None:
    """Raise ConfigError where the fullest rank does not fit its GPU; the message begins with `where`."""
    if found.usable_gib is None or found.memory_gib <= found.usable_gib:
        return
    raise ConfigError(
        f"{where}stage {found.stage} of {layout.pp} needs {found.memory_gib:,.1f} GiB, and a GPU has "
        f"{found.usable_gib:,.1f}",
        "recompute more (recompute=deepseek_v3, recompute=full), use more nodes with a larger parallel.pp or ep, or a "
        "smaller batch.micro_batch_size; moe-memory shows all stages",
    )
