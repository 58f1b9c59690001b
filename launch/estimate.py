"""What a job will need before it runs: memory of the fullest rank, hours and dollars. No torch import."""

from __future__ import annotations

from dataclasses import dataclass

from moe_train.config.schema import Config
from moe_train.config.validate import total_steps
from moe_train.model.arithmetic import flops_per_token
from moe_train.model.memory import GPUS, predict
from parallel.errors import ConfigError
from parallel.layout import ParallelLayout

GIB = 2**30


@dataclass(frozen=True)
class Estimate:
    """Args:
    stage, memory_gib, usable_gib: the fullest pipeline stage, and what a GPU has for it; None on CPU nodes.
    tokens: of the whole run.
    tokens_per_s: of one GPU, from the assumed MFU.
    hours, dollars: of the whole run.
    """

    stage: int
    memory_gib: float
    usable_gib: float | None
    tokens: int
    tokens_per_s: float
    hours: float
    dollars: float


def estimate(cfg: Config, layout: ParallelLayout) -> Estimate:
    """From a validated config."""
    stages = predict(cfg, layout)
    fullest = max(stages, key=lambda stage: stage.total)
    tokens = total_steps(cfg) * cfg.batch.global_batch_size * cfg.train.seq_length
    hours, tokens_per_s = time_of(cfg, layout, tokens)
    size = cfg.launcher.gpu_memory_gb
    return Estimate(
        stage=fullest.stage,
        memory_gib=fullest.total / GIB,
        usable_gib=None if cfg.runtime == "cpu" else GPUS.get(round(size), 0.97 * size * 1e9 / GIB),
        tokens=tokens,
        tokens_per_s=tokens_per_s,
        hours=hours,
        dollars=hours * layout.world_size * cfg.launcher.price_per_gpu_hour,
    )


def time_of(cfg: Config, layout: ParallelLayout, tokens: int) -> tuple[float, float]:
    """Hours for `tokens` and tokens/s of one rank, from launcher.assumed_mfu: no other place says how fast it is."""
    flops = flops_per_token(cfg.model, cfg.train.seq_length, causal=True, include_mtp=True)
    tokens_per_s = cfg.launcher.gpu_tflops * 1e12 * cfg.launcher.assumed_mfu / flops
    return tokens / tokens_per_s / layout.world_size / 3600, tokens_per_s


def check_memory(found: Estimate, layout: ParallelLayout) -> None:
    """Raise ConfigError where the fullest rank does not fit its GPU."""
    if found.usable_gib is None or found.memory_gib <= found.usable_gib:
        return
    raise ConfigError(
        f"stage {found.stage} of {layout.pp} needs {found.memory_gib:,.1f} GiB, and a GPU has {found.usable_gib:,.1f}",
        "recompute more (recompute=deepseek_v3, recompute=full), use more nodes with a larger parallel.pp or ep, or a "
        "smaller batch.micro_batch_size; moe-memory shows all stages",
    )
