"""Megatron-Core on NVIDIA GPUs that talk through NCCL. Nothing is patched to run on them, only to train the same."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist

from parallel.errors import HardwareError
from parallel.rank_info import RankInfo
from parallel.runtime import megatron_fixes, patching


def start(rank: RankInfo, timeout_s: int) -> torch.device:
    """Bind this process to its GPU and join the other ranks. Returns the device of this rank.

    Raises:
        HardwareError: the node has fewer GPUs than ranks.
    """
    device = torch.device("cuda", device_index(rank, torch.cuda.device_count()))
    torch.cuda.set_device(device)
    patching.apply(megatron_fixes.ON_ANY_DEVICE, device)
    if not dist.is_initialized():
        dist.init_process_group(
            "cpu:gloo,cuda:nccl",
            init_method=f"tcp://{rank.master_addr}:{rank.master_port}",
            rank=rank.rank,
            world_size=rank.world_size,
            timeout=timedelta(seconds=timeout_s),
            device_id=device,
        )
    return device


def device_index(rank: RankInfo, gpus: int) -> int:
    """Which of the `gpus` that this process sees is the rank's: its only one where Slurm has bound one to each rank
    (srun --gpus-per-task=1), else the one of its place on the node.

    Raises:
        HardwareError: the node has fewer GPUs than ranks.
    """
    if gpus == 1:
        return 0  # that no other rank has it too is checked where ranks compare what they found
    if rank.local_rank >= gpus:
        raise HardwareError(
            f"rank {rank.rank} is number {rank.local_rank + 1} on its node, which has {gpus} visible GPUs",
            "start one rank for each GPU, or set runtime=cpu",
        )
    return rank.local_rank
