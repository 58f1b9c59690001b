"""Speed and memory of training: step time, tokens/s, TFLOPS of a rank, model FLOPs utilisation (MFU), peak memory.

The FLOPs are those of the model, with causal attention (a token attends to half the sequence on average) and the
multi-token-prediction layers counted in; recomputation is not. See `moe_train.model.arithmetic.flops_per_token`.
"""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass

import torch
import torch.distributed as dist

from moe_train.config.quantities import batch_schedule
from moe_train.config.schema import Config
from moe_train.model.arithmetic import flops_per_token
from moe_train.run import Callback, Metrics, Run
from moe_train.telemetry import peak


@dataclass(frozen=True)
class Speed:
    """What a step time means. `mfu` is None where the peak of a rank is not known."""

    tokens_per_s: float
    """Over all ranks."""
    tflops_per_rank: float
    mfu: float | None
    """Fraction of the peak, 0 to 1."""


def speed(
    cfg: Config, world_size: int, step_time_s: float, peak_tflops: float | None, batch_size: float | None = None
) -> Speed:
    """Speed of `world_size` ranks that take `step_time_s` for a step of `cfg`.

    Args:
        batch_size: sequences in the step, which may be a mean; None means those of the last steps of a run.
    """
    tokens = (batch_schedule(cfg).last_size if batch_size is None else batch_size) * cfg.train.seq_length
    flops = tokens * flops_per_token(cfg.model, cfg.train.seq_length, causal=True, include_mtp=True)
    tflops = flops / step_time_s / world_size / 1e12
    return Speed(tokens / step_time_s, tflops, tflops / peak_tflops if peak_tflops else None)


def is_logged(run: Run) -> bool:
    """Whether the step just done has a line in metrics.jsonl: the first, each `log_interval_steps`-th and the last."""
    step = run.state.step
    return step in (1, run.total_steps) or step % run.cfg.telemetry.log_interval_steps == 0


def memory_peak_bytes(device: torch.device) -> int:
    """The most memory this rank has held: allocated by torch on a GPU, resident in the process on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): bytes on macOS, kibibytes on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Throughput(Callback):
    """Adds speed and memory to the metrics of logged steps. Must come before the callbacks that write them.

    `step_time_s` is the mean over the steps since the last logged one, evaluation and checkpoints left out, of the
    slowest rank; `memory_peak_bytes` is the maximum over ranks.
    """

    def __init__(self) -> None:
        self._elapsed_s, self._steps, self._samples = 0.0, 0, 0

    def on_start(self, run: Run) -> None:
        run.peak_tflops = peak.tflops_of_rank(run)

    def on_step_end(self, run: Run, metrics: Metrics) -> None:
        self._elapsed_s += run.clock.lap()
        self._steps += 1
        self._samples += run.last_batch_size
        if not is_logged(run):
            return
        mine = [self._elapsed_s / self._steps, float(memory_peak_bytes(run.device))]
        largest = torch.tensor(mine, dtype=torch.float64, device=run.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        step_time_s, memory = largest.tolist()
        now = speed(run.cfg, run.layout.world_size, step_time_s, run.peak_tflops, self._samples / self._steps)
        metrics["step_time_s"] = step_time_s
        metrics["tokens_per_s"] = now.tokens_per_s
        metrics["tflops_per_rank"] = now.tflops_per_rank
        metrics["mfu"] = now.mfu
        metrics["memory_peak_bytes"] = int(memory)
        self._elapsed_s, self._steps, self._samples = 0.0, 0, 0
