"""Memory: what the model of memory predicts, at the start of every run, and what the first steps really keep."""

from __future__ import annotations

import torch
import torch.distributed as dist

from moe_train.model.memory import predict, workload_of
from moe_train.run import Callback, Metrics, Run
from moe_train.telemetry.saved_tensors import SavedTensors, static_bytes
from parallel.planner.memory import saved_per_micro_batch

PARTS = ("saved_activation_bytes", "parameter_bytes", "gradient_bytes", "optimizer_bytes")
_MIB = 2**20


class MemoryForecast(Callback):
    """Reports on rank 0, before the first step, the peak memory of the rank that will need most."""

    def on_start(self, run: Run) -> None:
        if not (run.is_main and run.cfg.telemetry.progress):
            return
        stages = predict(run.cfg, run.layout)
        fullest = max(stages, key=lambda stage: stage.total)
        static = fullest.parameters + fullest.gradients + fullest.optimizer
        where = f" on pipeline stage {fullest.stage} of {len(stages)}" if len(stages) > 1 else ""
        print(
            f"memory of a rank{where}, predicted: {fullest.total / _MIB:,.0f} MiB (weights, gradients and optimizer "
            f"{static / _MIB:,.0f}, activations {fullest.activations / _MIB:,.0f}, logits "
            f"{fullest.logits / _MIB:,.0f}); moe-memory has the parts",
            flush=True,
        )


class MemoryProfiler(Callback):
    """Measures what `PARTS` names in the first `telemetry.profile_memory_steps` steps, as metrics of the step.

    Each is a list with an entry for each pipeline stage: the mean over the stage's ranks, in bytes. Activations are
    those of the first micro-batch: what its forward pass keeps for its backward pass, logits included.
    """

    def __init__(self) -> None:
        self._saved: SavedTensors | None = None
        self._steps = 0

    def on_start(self, run: Run) -> None:
        self._saved = SavedTensors(chunk.module for chunk in run.chunks)
        self._saved.start()

    def on_step_end(self, run: Run, metrics: Metrics) -> None:
        if self._saved is None:
            return
        values = [self._saved.stop(), *static_bytes(run.chunks, run.optimizer)]
        metrics.update(_by_stage(run, values))
        if run.is_main and run.cfg.telemetry.progress:
            _show(run, metrics)
        self._steps += 1
        if self._steps < run.cfg.telemetry.profile_memory_steps:
            self._saved.start()
        else:
            self._saved = None

    def on_end(self, run: Run) -> None:
        if self._saved is not None:
            self._saved.stop()


def _by_stage(run: Run, values: list[int]) -> dict[str, list[int]]:
    """Mean of each value over the ranks of each pipeline stage."""
    layout = run.layout
    table = torch.zeros(layout.pp, len(values), dtype=torch.float64, device=run.device)
    table[layout.coordinates(run.rank.rank).pp] = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(table)
    means = (table / (layout.world_size // layout.pp)).round().long()
    return {name: means[:, i].tolist() for i, name in enumerate(PARTS)}


def _show(run: Run, metrics: Metrics) -> None:
    workload = workload_of(run.cfg, run.layout)
    for stage, saved in enumerate(metrics[PARTS[0]]):
        expected = saved_per_micro_batch(workload, stage)
        others = ", ".join(f"{name.removesuffix('_bytes')}s {metrics[name][stage] / _MIB:,.2f}" for name in PARTS[1:3])
        print(
            f"memory of a rank on stage {stage}, measured: a micro-batch keeps {saved / _MIB:,.2f} MiB (predicted "
            f"{expected / _MIB:,.2f}, {expected / saved - 1:+.1%}), {others}, optimizer "
            f"{metrics[PARTS[3]][stage] / _MIB:,.2f}",
            flush=True,
        )
