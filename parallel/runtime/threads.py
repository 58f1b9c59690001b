"""Threads of CPU operations."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch


def use_threads(count: int) -> None:
    """Compute with `count` threads in the calling thread, and with one in every other thread of this process.

    A gloo thread that copies a large tensor with several threads keeps them. OpenMP then counts more threads than
    cores, and idle ones sleep at once instead of spinning: a small GEMM takes 80 us instead of 12 (two threads on a
    Zen 4).
    """
    torch.set_num_threads(1)
    if count == 1:
        return
    torch.get_num_threads()  # torch sets the number of each thread once, at the first operation that asks for it
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib/libtorch_cpu.so"))
        for function in (library.omp_set_num_threads, library.MKL_Set_Num_Threads_Local):
            function(count)
    except (OSError, AttributeError):  # another platform, or PyTorch without OpenMP or MKL
        torch.set_num_threads(count)
