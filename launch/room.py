"""Whether a run has room in the memory of this machine, before a model is built. No torch import."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import psutil

from moe_train.config.resolve import resolve
from moe_train.config.schema import Config
from moe_train.model.memory import predict
from parallel.errors import ConfigError
from parallel.layout import ParallelLayout

GIB, MIB = 2**30, 2**20
_UNLIMITED = 2**60  # what cgroup v1 writes for no limit is of this order


def check(cfg: Config, layout: ParallelLayout, local_ranks: Sequence[int] | None = None) -> None:
    """Refuse a model that needs more memory than the ranks of this machine can get, by the planner's memory model.

    On the CPU that is what all of them hold at once; on GPUs the weights, gradients and optimizer state of one rank
    against the smallest GPU.

    Args:
        local_ranks: ranks that run on this machine; None means all.

    Raises:
        ConfigError: with what is needed, what there is, and what would need less.
    """
    if not cfg.launcher.check_memory:
        return
    stages = predict(cfg, layout)
    runtime = resolve(cfg, layout).runtime
    if runtime == "cpu":
        ranks = range(layout.world_size) if local_ranks is None else local_ranks
        needed = sum(stages[layout.coordinates(rank).pp].total for rank in ranks)
        need = "1 rank needs" if len(ranks) == 1 else f"{len(ranks)} ranks need"
        _refuse(cfg, needed, available_bytes(), f"{need} {needed / GIB:,.1f} GiB of memory", "this machine has")
    elif runtime == "cuda" and (smallest := gpu_bytes()) is not None:
        needed = max(stage.parameters + stage.gradients + stage.optimizer for stage in stages)
        need = f"weights, gradients and optimizer state of one rank need {needed / GIB:,.1f} GiB"
        _refuse(cfg, needed, smallest, need, "its GPU has")


def _refuse(cfg: Config, needed: float, room: float, need: str, where: str) -> None:
    if needed <= room:
        return
    raise ConfigError(
        f"model.name={cfg.model.name}: {need}, and {where} {room / GIB:,.1f} available",
        "use a smaller model or train.seq_length, more machines (moe-memory shows what a rank holds, moe-plan which "
        "layouts fit), or launcher.check_memory=false to start it anyway",
    )


def available_bytes(proc: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory that new processes can get on this machine: what the system has, within the limits of its cgroups."""
    available = int(psutil.virtual_memory().available)
    for limit, used in _cgroups(proc, mount):
        available = min(available, max(0, limit - used))
    return available


def _cgroups(proc: Path, mount: Path) -> list[tuple[int, int]]:
    """(limit, bytes in use that cannot be given back) of the cgroups of this process, from its own to the root."""
    try:
        lines = proc.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    limits = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # cgroup v2
            root, limit, usage, cache = mount, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, limit, usage, cache = (
                mount / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file",
            )  # fmt: skip
        else:
            continue
        own = root / path.lstrip("/")
        for folder in (own, *own.parents):
            if not folder.is_relative_to(root):
                break
            if cgroup_limits := _limits(folder, limit, usage, cache):
                limits.append(cgroup_limits)
    return limits


def _limits(folder: Path, limit: str, usage: str, cache: str) -> tuple[int, int] | None:
    """Limit and use of one cgroup; None where it has no limit."""
    try:
        most, used = int((folder / limit).read_text()), int((folder / usage).read_text())
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # "max", a container that hides its cgroup, or a kernel without this controller
        return None
    return None if most >= _UNLIMITED else (most, used - int(statistics.get(cache, 0)))


def gpu_bytes() -> int | None:
    """Memory of the smallest GPU that nvidia-smi shows; None where it is not there or does not answer."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return min(int(line) for line in done.stdout.split("\n") if line.strip()) * MIB
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
