"""What device code runs on: `cuda`, `cpu` (gloo) or `simulated` (fake process group, tensors without storage)."""

from __future__ import annotations

import torch

from parallel.errors import HardwareError
from parallel.rank_info import RankInfo


def choose(name: str) -> str:
    """The runtime that `name` (auto, cuda, cpu, simulated) means on this machine.

    Raises:
        HardwareError: cuda is asked for and no GPU is visible.
    """
    gpus = torch.cuda.device_count()
    if name == "auto":
        return "cuda" if gpus else "cpu"
    if name == "cuda" and not gpus:
        raise HardwareError(
            "runtime=cuda, but no GPU is visible", "set runtime=cpu, or check nvidia-smi and the CUDA torch"
        )
    return name


def start(name: str, rank: RankInfo, timeout_s: int) -> torch.device:
    """Prepare this process for `name`, join the other ranks, and return this rank's device."""
    if name == "cuda":
        from parallel.runtime import cuda

        return cuda.start(rank, timeout_s)
    if name == "cpu":
        from parallel.runtime import cpu

        return cpu.start(rank, timeout_s)
    from parallel.runtime import simulated

    return simulated.start(rank.rank, rank.world_size)
