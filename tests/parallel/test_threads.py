"""How many threads compute, in the thread that asks for them and in others."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from parallel.runtime.threads import use_threads

ROOT = Path(__file__).parents[2]


def test_other_threads_have_one() -> None:
    """Also those that began before, as those of gloo do. Run apart: it changes the whole process."""
    code = "from tests.parallel import test_threads; test_threads.compute_in_two_threads()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def compute_in_two_threads() -> None:
    """In a process of its own."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(os.getpid).result()
        use_threads(3)
        assert torch.get_num_threads() == 3
        assert "mkl_get_max_threads() : 3" in torch.__config__.parallel_info()
        multiply()
        before = len(os.listdir("/proc/self/task"))
        assert pool.submit(multiply).result() == 1
        assert len(os.listdir("/proc/self/task")) == before
        assert multiply() == 3
    use_threads(1)
    assert torch.get_num_threads() == 1


def multiply() -> int:
    """Operations that several threads would share, in torch and in MKL. Returns the number of threads."""
    matrix = torch.ones(500, 500)
    assert torch.mm(matrix, matrix + 1)[0, 0] == 1000
    return torch.get_num_threads()


def test_without_mkl_all_threads_have_as_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries of other platforms lack the functions."""
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr("ctypes.CDLL", lambda _: object())
    use_threads(2)
    assert asked == [1, 2]
