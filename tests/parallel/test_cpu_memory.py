"""Memory that a step frees is there for the next one."""

from __future__ import annotations

import platform
import resource

import pytest
import torch

from tests.distributed.helper import run_distributed


def page_faults(keep: bool) -> int:
    """Pages that the kernel had to clear for ten 64 MiB tensors, each freed before the next, after ten others."""
    from parallel.runtime import cpu

    if keep:
        cpu.keep_freed_memory()
    before = 0
    for number in range(20):
        if number == 10:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.empty(1 << 24).fill_(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_is_kept() -> None:
    (returned,), (kept,) = (run_distributed(page_faults, 1, keep) for keep in (False, True))
    assert returned > 100
    assert kept < returned / 4
