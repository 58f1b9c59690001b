"""GEMM kernels are measured once for a processor; the decision stays, and a busy machine takes the defaults."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from moe_train.model.kernels import cpu_gemm, cpu_kernels
from tests.distributed.helper import run_distributed

FP32 = torch.float32


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "moe-train" / "cpu_kernels.json"


def slow_down(monkeypatch: pytest.MonkeyPatch, operation: str, name: str, seconds: list[float]) -> None:
    """Let one kernel take `seconds` more, in turn."""
    original, calls = cpu_gemm.KERNELS[operation][name], iter(range(10**6))

    def slow(*arguments: object) -> torch.Tensor:
        time.sleep(seconds[next(calls) % len(seconds)])
        return original(*arguments)

    monkeypatch.setitem(cpu_gemm.KERNELS[operation], name, slow)


def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing that else runs here count as noise."""
    monkeypatch.setattr(cpu_kernels, "_NOISE", 1e9)
    monkeypatch.setattr(cpu_kernels, "_LONGEST_S", 1e9)


@pytest.mark.parametrize("slow", ["torch", "onednn"])
def test_the_faster_kernel_wins_and_is_remembered(slow: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quiet(monkeypatch)
    monkeypatch.setattr(cpu_gemm, "KERNELS", {"matmul": dict(cpu_gemm.KERNELS["matmul"])})
    slow_down(monkeypatch, "matmul", slow, [0.2])
    choice = cpu_kernels.measure_and_remember(FP32)
    assert choice == {"matmul": {"torch": "onednn", "onednn": "torch"}[slow]}
    assert json.loads(cache.read_text()) == {cpu_kernels.key_of(FP32): choice}
    assert cpu_kernels.remembered(FP32) == choice
    assert cpu_kernels.remembered(torch.bfloat16) is None
    new = cache.with_name("new")
    new.touch()
    assert cache.stat().st_mode == new.stat().st_mode  # as the umask says


def test_a_busy_machine_takes_the_defaults_and_keeps_them(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_gemm, "KERNELS", {"matmul": dict(cpu_gemm.KERNELS["matmul"])})
    slow_down(monkeypatch, "matmul", "onednn", [0.0, 0.3, 0.3])  # the best is fast, the median is not
    assert cpu_kernels.measure(FP32) is None
    assert cpu_kernels.measure_and_remember(FP32) == {"matmul": "onednn"}
    assert cpu_kernels.remembered(FP32) == {"matmul": "onednn"}


def test_the_measurement_ends_on_a_machine_that_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_kernels, "_LONGEST_S", 0.0)
    assert cpu_kernels.measure(FP32) is None


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "[" * 100_000, '{"KEY": {"matmul": "no-such-kernel"}}', '{"KEY": 3}']
)
def test_a_damaged_cache_is_no_choice(content: str, cache: Path) -> None:
    cache.parent.mkdir()
    cache.write_text(content.replace("KEY", cpu_kernels.key_of(FP32)))
    assert cpu_kernels.remembered(FP32) is None


def test_without_a_cache_directory_the_defaults_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A measurement that cannot be kept would change how a resumed run rounds."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(cpu_kernels, "measure", lambda dtype: pytest.fail("measured"))
    assert cpu_kernels.measure_and_remember(FP32) == cpu_kernels.defaults(FP32)


def test_a_full_disk_means_the_defaults(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cpu_kernels, "measure", lambda dtype: {"matmul": "torch"})
    monkeypatch.setattr(os, "replace", full)
    assert cpu_kernels.measure_and_remember(FP32) == cpu_kernels.defaults(FP32)
    assert list(cache.parent.iterdir()) == []


def test_what_a_choice_leaves_out_is_the_default() -> None:
    cpu_gemm.use(FP32, {"matmul": "torch"})
    try:
        assert cpu_gemm._kernels(FP32)["matmul"] is torch.mm
        assert cpu_gemm._kernels(FP32)["outer"] is cpu_gemm.KERNELS["outer"][cpu_gemm.DEFAULTS[FP32]["outer"]]
        with pytest.raises(KeyError):
            cpu_gemm.use(FP32, {"matmul": "no-such-kernel"})
    finally:
        cpu_gemm.use(FP32, {})


def choose_on_this_rank(directory: str) -> str:
    """What this rank runs after a choice that only rank 0 can read."""
    rank = dist.get_rank()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", f"{directory}/{rank}")
        if rank == 0:
            path = cpu_kernels.cache_file()
            assert path is not None
            path.parent.mkdir(parents=True)
            choice = cpu_kernels.defaults(FP32) | {"matmul": "torch"}
            path.write_text(json.dumps({cpu_kernels.key_of(FP32): choice}))
        cpu_kernels.choose(FP32)
    return next(
        name for name, kernel in cpu_gemm.KERNELS["matmul"].items() if kernel is cpu_gemm._kernels(FP32)["matmul"]
    )


def test_all_ranks_run_what_rank_0_runs(tmp_path: Path) -> None:
    assert run_distributed(choose_on_this_rank, 2, str(tmp_path)) == ["torch", "torch"]
