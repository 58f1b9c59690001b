"""The processes of `make bench-step`, each with one model."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bench import step_profile
from bench.step_data import StepTask
from bench.workers import Requests

Step = Callable[[], float]
OURS = "moe-train"


@dataclass(frozen=True)
class Side:
    """What one process trains."""

    step: Step
    modules: list[Any]
    optimizer: Any = None
    """Megatron-Core's; None for torch's."""


def prepare(side: str, task: StepTask, weights: Path) -> Requests:
    """The requests of the process that trains `side` (moe-train, or an experts implementation of transformers)."""
    import torch

    from bench import step_grouped
    from parallel.runtime.threads import use_threads

    if side == OURS:
        use_threads(task.threads)  # as the launcher does
    else:
        torch.set_num_threads(task.threads)
    trained = _ours(task, weights) if side == OURS else _transformers(side, task, weights)
    return {
        "steps": lambda count: [_timed(trained.step) for _ in range(count)],
        "profile": lambda count: step_profile.profile(trained.modules, trained.optimizer, trained.step, count),
        "grouped": lambda: step_grouped.measure(task),
        "gemm": lambda: _gemm_tflops(task.dtype),
    }


def _timed(step: Step) -> tuple[float, float]:
    began = time.perf_counter()
    loss = step()
    return loss, time.perf_counter() - began


def _ours(task: StepTask, weights: Path) -> Side:
    """This project, after its initial weights were written to `weights`."""
    import torch
    from megatron.core.utils import unwrap_model

    from bench import step_data
    from bench.step_transformers import from_megatron
    from moe_train.train import prepare
    from parallel.rank_info import RankInfo

    cfg = task.config()
    run = prepare(cfg, RankInfo(0, 1, 0, 1, "127.0.0.1", step_data.free_port(), "local"))
    (model,) = unwrap_model(list(run.chunks))
    state = {name: value.detach().clone() for name, value in [*model.named_parameters(), *model.named_buffers()]}
    torch.save(from_megatron(state, cfg.model), weights)
    data = [step_data.batches(task, cfg.model.vocab_size)]
    return Side(partial(_step, run, data), run.chunks, run.optimizer)


def _step(run: Any, data: list[Any]) -> float:
    from moe_train.loop import step

    return float(step.train_step(run, data)["lm_loss"])


def _transformers(experts: str, task: StepTask, weights: Path) -> Side:
    import torch

    from bench import step_data, step_transformers
    from parallel.runtime.cpu import keep_freed_memory

    keep_freed_memory()  # as `prepare` does for ours
    cfg = task.config()
    model = step_transformers.build(cfg, torch.load(weights, weights_only=True), experts)
    data, step = step_data.batches(task, cfg.model.vocab_size), step_transformers.train_step(cfg, model)
    return Side(lambda: step(next(data)), [model])


def _gemm_tflops(dtype: str) -> float:
    """Best of some short runs of the square GEMM whose speed is also the peak in MFU."""
    from moe_train.model.precision import DTYPES
    from moe_train.telemetry import peak

    return peak.measure_cpu(DTYPES[dtype])
