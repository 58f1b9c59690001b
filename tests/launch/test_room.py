"""A model that needs more memory than the machine has is refused before anything is built."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from launch import room
from moe_train.config.composition.compose import compose
from moe_train.config.composition.validate import validate
from moe_train.model.memory import predict
from parallel.errors import ConfigError

GIB = 2**30


def test_a_30b_model_is_refused_on_a_laptop_before_anything_is_imported(tmp_path: Path) -> None:
    words = ["model=qwen3_30b_a3b", "runtime=cpu", "data=text", "data.path=nowhere.txt", f"run_dir={tmp_path}/run"]
    train = f"import sys; from launch.main import run; sys.argv[1:] = {words!r}; code = run()"
    code = f"{train}; print('torch' in sys.modules); sys.exit(code)"
    (tmp_path / "nowhere.txt").write_text("text")
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stdout.splitlines()[-1] == "False"
    assert done.stderr.startswith("error: model.name=qwen3_30b_a3b: 1 rank needs ")
    assert "launcher.check_memory=false" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()
    assert time.monotonic() - began < 100


def test_all_ranks_of_the_machine_count(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = compose(["model=tiny", "runtime=cpu", "parallel.pp=2", "parallel.dp=2"])
    layout = validate(cfg)
    first, last = (stage.total for stage in predict(cfg, layout))
    monkeypatch.setattr(room, "available_bytes", lambda: 2 * first + 2 * last - 1)
    with pytest.raises(ConfigError, match="4 ranks need"):
        room.check(cfg, layout)
    room.check(cfg, layout, [0, 1, 2])
    monkeypatch.setattr(room, "available_bytes", lambda: 2 * first + 2 * last)
    room.check(cfg, layout)
    monkeypatch.setattr(room, "available_bytes", lambda: 2 * first - 1)
    with pytest.raises(ConfigError, match="2 ranks need"):  # of the first stage: pp is the outermost dimension
        room.check(cfg, layout, [0, 1])


def test_it_can_be_tried_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "available_bytes", lambda: 0)
    cfg = compose(["model=tiny", "runtime=cpu"])
    with pytest.raises(ConfigError):
        room.check(cfg, validate(cfg))
    cfg = compose(["model=tiny", "runtime=cpu", "launcher.check_memory=false"])
    room.check(cfg, validate(cfg))


def cgroup(folder: Path, limit: str, used: int, cache: int, names: tuple[str, str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\n{names[2]} {cache}\n")


V2 = ("memory.max", "memory.current", "inactive_file")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


@pytest.mark.parametrize(
    ("names", "line", "root"), [(V2, "0::/job/step", ""), (V1, "7:cpu,memory:/job/step", "memory")]
)
def test_limits_of_cgroups_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, str, str], line: str, root: str
) -> None:
    """The tightest from the own cgroup to the root; a cache that the kernel gives back is not in use."""
    proc, mount = tmp_path / "cgroup", tmp_path / "fs"
    proc.write_text(f"1:name=systemd:/other\n{line}\n")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 100 * GIB}))
    unlimited = "max" if names is V2 else str(2**63 - 4096)
    cgroup(mount / root / "job/step", unlimited, 5 * GIB, 0, names)
    assert room.available_bytes(proc, mount) == 100 * GIB
    cgroup(mount / root / "job", str(16 * GIB), 6 * GIB, 2 * GIB, names)
    assert room.available_bytes(proc, mount) == 12 * GIB
    cgroup(mount / root / "job/step", str(8 * GIB), 7 * GIB, 0, names)
    assert room.available_bytes(proc, mount) == 1 * GIB
    cgroup(mount / root / "job/step", str(8 * GIB), 9 * GIB, 0, names)
    assert room.available_bytes(proc, mount) == 0
    assert room.available_bytes(tmp_path / "none", mount) == 100 * GIB


def test_a_gpu_that_cannot_hold_the_weights_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """24 GiB hold a model of 1B parameters in BF16 with its optimizer, and none of 8B."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nprintf '81559\\n24576\\n'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert room.gpu_bytes() == 24 * GIB
    cfg = compose(["model=llama3_8b", "runtime=cuda", "precision=bf16"])
    with pytest.raises(
        ConfigError, match=r"weights, gradients and optimizer state of one rank need 1\d\d\.\d GiB, and its"
    ):
        room.check(cfg, validate(cfg))
    cfg = compose(["model=llama3_8b", "model.num_layers=2", "model.vocab_size=32000", "runtime=cuda", "precision=bf16"])
    room.check(cfg, validate(cfg))
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert room.gpu_bytes() is None
