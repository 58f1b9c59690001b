"""What a run will need before it is submitted: memory of the peak rank, and hours. No torch import."""

from __future__ import annotations

from dataclasses import dataclass, field

from moe_train.config.plan import EstimateConfig
from moe_train.config.quantities import batch_schedule
from moe_train.config.resolve import total_steps
from moe_train.config.schema import Config
from moe_train.model.arithmetic import flops_per_token
from moe_train.model.estimate import MEGATRON, USUAL, estimate_run
from moe_train.model.memory import predict
from parallel.errors import ConfigError
from parallel.layout import ParallelLayout
from parallel.planner.hardware import Hardware

GIB = 2**30


@dataclass(frozen=True)
class Pace:
    """How fast a run is on the GPUs of `cluster`, and its hours. `mfu` counts causal attention as such."""

    step_s: float
    tokens_per_s_per_gpu: float
    mfu: float
    hours: float
    schedule: str


@dataclass(frozen=True)
class RunEstimate:
    """What one run needs.

    Args:
        stage, memory_gib, usable_gib: the peak pipeline stage of moe-train, and what a GPU has for it; None
            on CPU nodes.
        tokens: of the whole run.
        pace: None on CPU nodes.
        assumed: the software and what else `pace` assumes.
    """

    stage: int
    memory_gib: float
    usable_gib: float | None
    tokens: int
    pace: Pace | None
    assumed: EstimateConfig = field(default_factory=EstimateConfig)


def run_estimate(cfg: Config, layout: ParallelLayout, plan: EstimateConfig = USUAL) -> RunEstimate:
    """From a validated config.

    Raises:
        ConfigError: `plan` describes a step that cannot be timed.
    """
    peak = max(predict(cfg, layout), key=lambda stage: stage.total)
    tokens = batch_schedule(cfg).samples_after(0, total_steps(cfg)) * cfg.train.seq_length
    gpus = cfg.runtime != "cpu"
    return RunEstimate(
        stage=peak.stage,
        memory_gib=peak.total / GIB,
        usable_gib=Hardware.of(cfg.cluster).usable_bytes / GIB if gpus else None,
        tokens=tokens,
        pace=pace(cfg, layout, tokens, plan) if gpus else None,
        assumed=plan,
    )


def pace(cfg: Config, layout: ParallelLayout, tokens: int, plan: EstimateConfig = USUAL) -> Pace:
    """The time that moe-plan gives for this layout, over so many tokens."""
    estimate = estimate_run(cfg, layout, plan)
    rate = estimate.step.tokens_per_s_per_gpu
    flops = flops_per_token(cfg.model, cfg.train.seq_length)
    return Pace(
        step_s=estimate.step.seconds,
        tokens_per_s_per_gpu=rate,
        mfu=rate * flops / (estimate.hardware.bf16_tflops * 1e12),
        hours=tokens / rate / layout.world_size / 3600,
        schedule=estimate.schedule,
    )


def assumptions(cfg: Config, estimate: RunEstimate) -> list[str]:
    """What the time of a run assumes that moe-train does not do."""
    plan, lines = estimate.assumed, []
    if cfg.precision.fp4:
        lines.append("time and cost are those of MXFP8: NVFP4, which is faster, is not timed")
    other = [f"plan.{name}=true" for name in ("fsdp", "frozen_weights") if getattr(plan, name)]
    other += [f"plan.software={plan.software}"] if plan.software != "megatron" else []
    if estimate.pace and estimate.pace.schedule not in MEGATRON:
        other.append(f"plan.schedules={plan.schedules}")
    if other:
        lines.append(f"time and cost are those of {', '.join(other)}, which moe-train does not have")
    return lines


def check_memory(estimate: RunEstimate, layout: ParallelLayout, where: str = "") -> None:
    """Raise ConfigError where the peak rank does not fit its GPU; the message begins with `where`."""
    if estimate.usable_gib is None or estimate.memory_gib <= estimate.usable_gib:
        return
    raise ConfigError(
        f"{where}stage {estimate.stage} of {layout.pp} needs {estimate.memory_gib:,.1f} GiB, and a GPU has "
        f"{estimate.usable_gib:,.1f}",
        "recompute more (recompute=deepseek_v3, recompute=full), use more nodes with a larger parallel.pp or ep, or a "
        "smaller batch.micro_batch_size; moe-memory shows all stages",
    )
