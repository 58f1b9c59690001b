"""One rank of a job of any size in one process: a process group that does nothing and tensors without storage."""

from __future__ import annotations

import torch
import torch.distributed as dist

from parallel.runtime import cpu

DEVICE = torch.device("meta")


def start(rank: int, world_size: int) -> torch.device:
    """Become `rank` of `world_size` ranks of which no other exists. Returns the device of this rank."""
    # The fake backend is part of torch's own test tools; it is how upstream simulates large worlds.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    cpu.prepare(DEVICE)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    return DEVICE
