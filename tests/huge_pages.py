"""Huge pages for a process that many others are forked from.

A fork copies one entry of the page table for each page: 16 ms for the 80,000 pages of 4 KiB that torch and
Megatron-Core leave on the heap, several times the work of many a rank. Of 2 MiB, it copies 150 entries.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

SIZE = 2 * 2**20
_MADV_COLLAPSE = 25  # linux/mman.h


def collapse() -> int:
    """Put the heap of this process on huge pages, and return how many. Other kernels than Linux from 6.1 on refuse."""
    try:
        madvise = ctypes.CDLL(None).madvise
        maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    except (AttributeError, OSError):
        return 0
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    collapsed = 0
    for line in maps:
        bounds, permissions, _, _, _, *name = line.split(maxsplit=5)
        if permissions != "rw-p" or (name and name[0] != "[heap]"):  # shared, of a file, or a stack
            continue
        start, end = (int(bound, 16) for bound in bounds.split("-"))
        # One at a time: a page that cannot be had, or that the process has never touched, stops a longer range.
        for address in range(-(-start // SIZE) * SIZE, end - SIZE + 1, SIZE):
            collapsed += madvise(address, SIZE, _MADV_COLLAPSE) == 0
    return collapsed
