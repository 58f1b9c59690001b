"""A run without a model, for the tests of callbacks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from moe_train.config.model import ModelConfig
from moe_train.config.resolve import resolve
from moe_train.config.schema import Config
from moe_train.loop.callbacks.sinks import CloseSinks, Sinks
from moe_train.run import Callback, Metrics, Run
from moe_train.telemetry.sinks.base import Sink
from moe_train.telemetry.sinks.table import SINKS, SinkRow
from parallel.layout import ParallelLayout
from parallel.rank_info import RankInfo

BATCH, SEQUENCE = 8, 16


def fake_run(run_dir: Path, *, step: int = 0, total_steps: int = 10, rank: int = 0, log_interval: int = 1) -> Run:
    """Rank `rank` of 2 of a run at `step`: one dense layer, two MoE layers, one multi-token-prediction layer."""
    cfg = Config(run_dir=str(run_dir))
    cfg.model = ModelConfig(num_layers=3, num_experts=2, topk=1, num_dense_layers=1, mtp_num_layers=1)
    cfg.batch.global_batch_size, cfg.train.seq_length = BATCH, SEQUENCE
    cfg.telemetry.log_interval_steps = log_interval
    layout = ParallelLayout(tp=2, pp=1, vpp=1, cp=1, ep=1, etp=1, dp=1)
    info = RankInfo(rank, 2, rank, 2, "127.0.0.1", 0, "local")
    run = Run(resolve(cfg, layout, runtime="cpu"), info, torch.device("cpu"), total_steps, run_dir)
    set_step(run, step)
    return run


def set_step(run: Run, step: int) -> None:
    """As if `step` steps were done."""
    run.state.step, run.state.consumed_tokens = step, step * BATCH * SEQUENCE
    run.state.trained_samples = run.state.consumed_samples = step * BATCH
    run.last_batch_size = BATCH


def metrics(loss: float = 5.0, **others: Any) -> Metrics:
    """What a step and `Throughput` measure."""
    return {
        "lm_loss": loss, "grad_norm": 1.5, "lr": 1e-3, "mtp_loss": 6.0, "seq_load_balancing_loss": 1.25,
        "expert_load": [[0, 0], [96, 32], [64, 64], [100, 28]], "step_time_s": 0.5, "tokens_per_s": 256.0,
        "tflops_per_rank": 0.01, "mfu": 0.25, "memory_peak_bytes": 2**28,
    } | others  # fmt: skip


def take_step(run: Run, callbacks: list[Any], loss: float = 5.0, **others: Any) -> None:
    """One step after which `callbacks` are called."""
    set_step(run, run.state.step + 1)
    run.last_metrics = metrics(loss, **others)
    for callback in callbacks:
        callback.on_step_end(run, run.last_metrics)


def evaluate(run: Run, callbacks: list[Any], loss: float) -> None:
    """One evaluation after which `callbacks` are called."""
    run.evaluations.append({"step": run.state.step, "tokens": run.state.consumed_tokens, "valid_loss": loss})
    for callback in callbacks:
        callback.on_evaluation_end(run, run.evaluations[-1])


def with_sinks(run: Run, *makers: Callable[[Path], Sink]) -> list[Callback]:
    """The callbacks that drive these sinks; without any, those of the config."""
    sinks = Sinks(run, [SinkRow(make, lambda telemetry: True) for make in makers] or SINKS)
    return [sinks, CloseSinks(sinks)]


def start(run: Run, callbacks: list[Callback]) -> None:
    """The start of a run with these callbacks."""
    run.callbacks = callbacks
    for callback in callbacks:
        callback.on_start(run)


def end(run: Run, callbacks: list[Callback]) -> None:
    """The end of a run with these callbacks."""
    for callback in callbacks:
        callback.on_end(run)
