"""Importing Megatron-Core on a CPU does not import Inductor."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from parallel.runtime.imports import without_compilation

ROOT = Path(__file__).parents[2]


def test_functions_stay_as_written_and_compilation_comes_back() -> None:
    compiled = torch.compile

    def double(x: int) -> int:
        return 2 * x

    with without_compilation():
        assert torch.compile(double) is double
        assert torch.compile(dynamic=True)(double) is double
    assert torch.compile is compiled
    with pytest.raises(ImportError, match="no module"), without_compilation():
        raise ImportError("no module")
    assert torch.compile is compiled


def test_what_forks_ranks_has_imported_what_they_need_and_no_inductor() -> None:
    """`torch._dynamo` is there, which optimizers would import in every rank."""
    code = (
        "import launch.local.preload, sys, torch\n"
        "for name in ('moe_train.train', 'torch._dynamo'):\n"
        "    print(name, name in sys.modules)\n"
        "print('Inductor', 'torch._inductor.compile_fx' in sys.modules, torch.compile.__module__)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    lines = done.stdout.splitlines()
    assert lines[:2] == ["moe_train.train True", "torch._dynamo True"], done.stderr
    assert lines[-1] == "Inductor False torch"
