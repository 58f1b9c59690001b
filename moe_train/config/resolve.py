"""What the rules look at: the config and what follows from it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from moe_train.config.schema import Config
from moe_train.schedules import BatchSchedule
from parallel.layout import ParallelLayout

DEFAULT_STEPS = 200


@dataclass(frozen=True)
class Facts:
    """A config with its defaults filled in.

    Args:
        layout: degrees of every dimension, dp included.
        runtime: cuda, cpu or simulated. `auto` is taken for what this machine has.
        backend: te or local.
        sequence_parallel: whether tensor-parallel ranks split the sequence.
        overlap_p2p: whether pipeline messages overlap with compute.
        total_steps: optimizer steps of the run.
        trains: whether a run is to follow, or only a prediction or a model without a run.
    """

    cfg: Config
    layout: ParallelLayout
    runtime: str
    backend: str
    sequence_parallel: bool
    overlap_p2p: bool
    total_steps: int
    trains: bool = True

    @property
    def data_ranks_batch(self) -> int:
        """Sequences of one micro-batch over all data-parallel ranks."""
        return self.cfg.batch.micro_batch_size * self.layout.dp


Rule = Callable[[Facts], None]


def gather_facts(cfg: Config, layout: ParallelLayout, trains: bool = True) -> Facts:
    """Fill in what the config leaves to be derived."""
    runtime = ("cuda" if gpu_visible() else "cpu") if cfg.runtime == "auto" else cfg.runtime
    backend = ("te" if runtime == "cuda" else "local") if cfg.backend.name == "auto" else cfg.backend.name
    parallel = cfg.parallel
    return Facts(
        cfg=cfg,
        layout=layout,
        runtime=runtime,
        backend=backend,
        sequence_parallel=layout.tp > 1 if parallel.sequence_parallel is None else parallel.sequence_parallel,
        overlap_p2p=layout.vpp > 1 if parallel.overlap_p2p is None else parallel.overlap_p2p,
        total_steps=total_steps(cfg),
        trains=trains and runtime != "simulated",
    )


def batch_schedule(cfg: Config) -> BatchSchedule:
    """The global batch size by the progress of the run."""
    return BatchSchedule.constant(cfg.batch.global_batch_size)


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


def gpu_visible() -> bool:
    """Whether an NVIDIA GPU is visible, found without torch, which takes seconds to import."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    return any(Path("/dev").glob("nvidia[0-9]*"))
