"""The config of a run with its defaults filled in. Everything that needs a derived value reads it here. No torch."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from moe_train.config.launcher import LauncherConfig
from moe_train.config.quantities import ENDS, RunProgress, batch_schedule
from moe_train.config.schedule import ScheduleConfig
from moe_train.config.schema import Config
from moe_train.schedules import FOLLOW_TOKENS
from parallel.layout import ParallelLayout

DEFAULT_STEPS = 200
_HANG_SHARE = 0.8  # of launcher.timeout_s
_JOB_RESTARTS = 3


@dataclass(frozen=True)
class ResolvedConfig:
    """A config with its layout and every derived default: the one place where `null` and `auto` become values.

    Args:
        layout: degrees of every dimension, dp included.
        runtime: cuda, cpu or simulated. `auto` is taken for what this machine has.
        backend: te or local.
        sequence_parallel: whether tensor-parallel ranks split the sequence.
        overlap_p2p: whether pipeline send/recv overlap with compute.
        fused: whether the fused kernels are used that Megatron-Core's docs recommend.
        grouped: whether the experts of a rank are one grouped GEMM.
        total_steps: optimizer steps of the run.
        trains: whether a run is to follow, or only a prediction or a model without a run.
    """

    cfg: Config
    layout: ParallelLayout
    runtime: str
    backend: str
    sequence_parallel: bool
    overlap_p2p: bool
    fused: bool
    grouped: bool
    total_steps: int
    trains: bool = True

    @property
    def data_ranks_batch(self) -> int:
        """Sequences of one micro-batch over all data-parallel ranks."""
        return self.cfg.batch.micro_batch_size * self.layout.dp


Rule = Callable[[ResolvedConfig], None]


def resolve(cfg: Config, layout: ParallelLayout, trains: bool = True, runtime: str | None = None) -> ResolvedConfig:
    """Fill in what the config leaves to be derived.

    Args:
        runtime: what a rank has found its device to be; None takes what this machine seems to have.
    """
    if runtime is None:
        runtime = ("cuda" if gpu_visible() else "cpu") if cfg.runtime == "auto" else cfg.runtime
    parallel, backend = cfg.parallel, cfg.backend
    return ResolvedConfig(
        cfg=cfg,
        layout=layout,
        runtime=runtime,
        backend=backend_of(cfg, runtime),
        sequence_parallel=layout.tp > 1 if parallel.sequence_parallel is None else parallel.sequence_parallel,
        overlap_p2p=layout.vpp > 1 if parallel.overlap_p2p is None else parallel.overlap_p2p,
        fused=runtime == "cuda" if backend.fusions is None else backend.fusions,
        grouped=True if backend.grouped_gemm is None else backend.grouped_gemm,
        total_steps=total_steps(cfg),
        trains=trains and runtime != "simulated",
    )


def backend_of(cfg: Config, runtime: str) -> str:
    """te or local: `backend.name`, where auto means te on cuda."""
    if cfg.backend.name == "auto":
        return "te" if runtime == "cuda" else "local"
    return cfg.backend.name


def hang_timeout_s(cfg: Config) -> float:
    """Time without progress in a step after which a rank ends itself, seconds; 0 means no limit."""
    own = cfg.resilience.hang_timeout_s
    return _HANG_SHARE * cfg.launcher.timeout_s if own is None else own


def restarts(launcher: LauncherConfig, in_batch_job: bool) -> int:
    """How often ranks are started again after a failure, in one batch job or by moe-train itself."""
    if launcher.restarts is not None:
        return launcher.restarts
    return _JOB_RESTARTS if in_batch_job else 0


def job_gpus_per_node(cfg: Config) -> int:
    """GPUs that a batch job requests per node."""
    if cfg.launcher.gpus_per_node is not None:
        return cfg.launcher.gpus_per_node
    return 0 if cfg.runtime == "cpu" else cfg.launcher.ranks_per_node


def decay_end(schedule: ScheduleConfig, steps: int) -> int:
    """Step at which the learning rate stops falling, of a run of `steps`."""
    return steps if schedule.decay_steps is None else schedule.decay_steps


def follows_length(cfg: Config) -> bool:
    """Whether a longer run has another learning rate in the same step."""
    segments = cfg.schedule.lr
    if not segments:
        return cfg.schedule.decay != "constant" and cfg.schedule.decay_steps is None
    last = segments[-1]
    is_open = all(getattr(last, name) is None for name in ENDS)
    in_fractions = any(segment.until_fraction is not None for segment in segments)
    return in_fractions or (is_open and last.shape not in ("constant", *FOLLOW_TOKENS))


def total_steps(cfg: Config, step: int = 0, consumed_tokens: int = 0, trained_samples: int | None = None) -> int:
    """Optimizer steps of the run: `train.steps`, or as many as `train.tokens` needs, or 200 where neither is given.

    A token budget counts all tokens of the run. What is left of it after `consumed_tokens` in `step` steps is divided
    into steps of the sizes to come, so that a changed global batch changes only those.

    Args:
        trained_samples: sequences of the steps so far; None where all had the length that they have now.
    """
    if cfg.train.steps is not None:
        return cfg.train.steps
    if cfg.train.tokens is None:
        return DEFAULT_STEPS
    length = cfg.train.seq_length
    left = max(0, cfg.train.tokens - consumed_tokens)
    trained = consumed_tokens // length if trained_samples is None else trained_samples
    return step + batch_schedule(cfg).steps_for(trained, -(-left // length))


def progress_of(cfg: Config, step: int = 0, tokens: int = 0, samples: int | None = None) -> RunProgress:
    """Steps and tokens of the run, which has done `step` steps of so many tokens and sequences.

    Args:
        samples: None where all sequences had the length that they have now.
    """
    length = cfg.train.seq_length
    trained = tokens // length if samples is None else samples
    steps = total_steps(cfg, step, tokens, trained)
    return RunProgress(batch_schedule(cfg), length, steps, step, tokens, trained)


def gpu_visible() -> bool:
    """Whether an NVIDIA GPU is visible, found without torch, which takes seconds to import."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    return any(Path("/dev").glob("nvidia[0-9]*"))
