"""Prediction for a published run: throughput, step time, memory of the peak rank. No torch import.

A row is a configuration (`tools.published.rows`), and takes the way of any other one: `moe_train.model.estimate`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from moe_train.config.model import ModelConfig
from moe_train.config.schema import Config, RecomputeConfig
from moe_train.model.arithmetic import flops_per_token
from moe_train.model.estimate import planned_workload, software_of
from moe_train.model.memory import weights_of
from parallel.architecture.attention import modules_of_other_attentions
from parallel.planner.calibration import FITTED, Calibration
from parallel.planner.estimate import estimate, fullest_bytes, megatron_schedule
from parallel.planner.memory import Weights
from parallel.planner.schedules import impossible
from parallel.planner.step_time import StepTime
from parallel.planner.workload import Workload
from parallel.suggest import Impossible
from tools.published.rows import CAUSAL_FLOPS_FROM, Row

# From the least work to the most.
RECOMPUTE = (
    RecomputeConfig(),
    RecomputeConfig(mode="selective", modules=["moe_act"]),
    RecomputeConfig(mode="selective", modules=["mla_up_proj"]),
    RecomputeConfig(mode="selective", modules=["layernorm", "moe_act"]),
    RecomputeConfig(mode="selective", modules=["layernorm", "moe_act", "mla_up_proj"]),
    RecomputeConfig(mode="selective", modules=["layernorm", "moe_act", "mla_up_proj", "mlp"]),
    RecomputeConfig(mode="selective", modules=["mlp"]),
    RecomputeConfig(mode="full"),
)
CHUNKS = (1, 2, 3, 4, 6, 8)  # of each rank, where they are not published


@dataclass(frozen=True)
class Prediction:
    """What the planner says of a row."""

    step: StepTime
    workload: Workload
    memory_bytes: float
    fits: bool

    @property
    def recompute(self) -> str:
        """The recomputation that was published or chosen."""
        return "+".join(sorted(self.workload.recompute_modules)) or self.workload.recompute


def predict(row: Row, constants: Calibration = FITTED, simulated: bool = True) -> Prediction:
    """The fastest of what the row leaves open that fits memory; where nothing fits, the one that needs least."""
    best: Prediction | None = None
    smallest: Prediction | None = None
    is_open = row.open_vpp
    for workload in candidates(row):
        weights = weights_of(row.model, workload)
        size = fullest_bytes(workload, weights, row.schedule)
        fits = size <= row.hardware.usable_bytes
        if best is not None and not fits:
            continue
        if fits or smallest is None or size < smallest.memory_bytes:
            step = timed(row, workload, weights, constants, simulated and not is_open)
            candidate = Prediction(step, workload, size, fits)
            if fits and (
                best is None or candidate.step.seconds / candidate.step.tokens < best.step.seconds / best.step.tokens
            ):
                best = candidate
            if smallest is None or size < smallest.memory_bytes:
                smallest = candidate
        if best is not None and not is_open:
            break  # candidates come in the order of the work they recompute
    chosen = best or smallest
    if chosen is None:
        raise Impossible("the row has no candidate")
    if is_open and simulated:
        weights = weights_of(row.model, chosen.workload)
        chosen = replace(chosen, step=timed(row, chosen.workload, weights, constants))
    return chosen


def timed(
    row: Row, workload: Workload, weights: list[Weights], constants: Calibration = FITTED, simulated: bool = True
) -> StepTime:
    """Time of a step. Where the micro-batches do not fill the interleaved schedule's rounds, of the next number that
    does."""
    schedule = row.schedule or megatron_schedule(workload)
    if impossible(schedule, workload.layout.pp, workload.layout.vpp, workload.micro_batches):
        pp = workload.layout.pp
        workload = replace(workload, micro_batches=-(-workload.micro_batches // pp) * pp)
    software = software_of(row.cfg, row.plan, workload, constants)
    return estimate(workload, row.hardware, software, weights, schedule, constants, simulated).step


def candidates(row: Row) -> Iterator[Workload]:
    """Every workload that fits what is published, those that recompute least first."""
    model, layout = row.model, row.layout
    chunks = [layout.vpp]
    if row.open_vpp and layout.pp > 1:
        chunks = [vpp for vpp in CHUNKS if model.num_layers // (layout.pp * vpp) >= 1]
    for recompute in possible(model) if row.open_recompute else [row.cfg.recompute]:
        cfg: Config = replace(row.cfg, recompute=recompute)
        for vpp in chunks:
            try:
                yield planned_workload(cfg, row.plan, replace(layout, vpp=vpp))
            except Impossible:  # fewer layers than stages
                continue


def possible(model: ModelConfig) -> list[RecomputeConfig]:
    """The sets of `RECOMPUTE` that change anything of this model, each once."""
    settings: list[RecomputeConfig] = []
    for recompute in RECOMPUTE:
        modules = set(recompute.modules) - modules_of_other_attentions(model)
        if not model.is_moe:
            modules -= {"moe_act"}
        if 0 not in model.moe_layer_pattern:
            modules -= {"mlp"}
        candidate = replace(recompute, modules=sorted(modules))
        if (candidate.mode != "selective" or modules) and candidate not in settings:
            settings.append(candidate)
    return settings


def published_tokens_per_s(row: Row) -> float | None:
    """Tokens/s/GPU as published, or from TFLOPS or MFU by the source's convention."""
    run = row.run
    if run.tokens_per_s_per_gpu is not None:
        return run.tokens_per_s_per_gpu
    tflops = run.tflops_per_gpu
    if tflops is None and run.mfu_pct is not None:
        tflops = run.mfu_pct / 100 * row.hardware.bf16_tflops
    return None if tflops is None else tflops * 1e12 / published_flops(row)


def published_flops(row: Row) -> float:
    """FLOPs of a token by the convention of the source: before 2025.04 Megatron did not count causality."""
    run, model = row.run, row.model
    causal = row.month >= CAUSAL_FLOPS_FROM if run.flops_causal is None else run.flops_causal
    mtp = bool(run.flops_mtp and model.mtp_num_layers)
    flops = flops_per_token(model, row.cfg.train.seq_length, causal and not run.flops_hardware, mtp)
    return flops * (4 / 3 if run.flops_hardware else 1)
