"""Megatron-Core on CPU processes that talk through gloo."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Collection
from datetime import timedelta

import torch
import torch.distributed as dist

from parallel.rank_info import RankInfo
from parallel.runtime import megatron_fixes, patching, torch_cuda

DEVICE = torch.device("cpu")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGE_BYTES = 1 << 30


def prepare(device: torch.device = DEVICE, skip: Collection[str] = ()) -> None:
    """Make `torch.cuda` and Megatron-Core usable without a GPU in this process. `skip` is for tests of patches."""
    # A setting, not a patch: compiling Megatron-Core's fusions takes longer here than it saves, and needs a compiler.
    torch._dynamo.config.disable = True
    patching.apply((*torch_cuda.PATCHES, *megatron_fixes.PATCHES), device, skip)


def keep_freed_memory() -> None:
    """Have malloc reuse large blocks instead of giving them back: every step allocates the same tensors again, and the
    kernel would clear each page again (50,000 page faults and a quarter of the time of a small model's step)."""
    with contextlib.suppress(AttributeError, OSError):  # another C library than glibc has no mallopt
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _LARGE_BYTES)


def start(rank: RankInfo, timeout_s: int) -> torch.device:
    """Prepare this process and join the other ranks. Returns the device of this rank."""
    prepare()
    keep_freed_memory()
    # torch's flight recorder notes the Python stack of every collective of every group, adding half to the latency of
    # a small one, and its entries have raced between gloo's worker threads (pytorch pull request 179449).
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "0")
    if not dist.is_initialized():
        dist.init_process_group(
            "gloo",
            init_method=f"tcp://{rank.master_addr}:{rank.master_port}",
            rank=rank.rank,
            world_size=rank.world_size,
            timeout=timedelta(seconds=timeout_s),
        )
    return DEVICE
