"""`moe-preflight` with a fault on one rank: python -m tests.launch.preflight.faults FAULT OVERRIDE..."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import torch

from launch import main
from launch.local import forkserver
from launch.preflight import facts, measure, rank
from moe_train.config.schema import Config
from parallel.rank_info import RankInfo

BROKEN = 2  # its node is called broken; each other node has one rank too


def none(cfg: Config, info: RankInfo) -> None:
    facts.node_name = lambda: "broken" if info.rank == BROKEN else f"good{info.rank}"
    rank.run(cfg, replace(info, local_rank=0, local_world_size=1))


def version(cfg: Config, info: RankInfo) -> None:
    if info.rank == BROKEN:
        facts.code_digest = lambda: "0123456789ab"  # type: ignore[assignment]
    none(cfg, info)


def clock(cfg: Config, info: RankInfo) -> None:
    before = measure.now
    if info.rank == BROKEN:
        measure.now = lambda: before() + 60
    none(cfg, info)


def slow(cfg: Config, info: RankInfo) -> None:
    """The clock of its processor is low."""
    before = measure.gemm_times
    if info.rank == BROKEN:

        def gemm_times(device: torch.device) -> measure.GemmTimes:
            found = before(device)
            return replace(found, mean_s=2 * found.mean_s, median_s=2 * found.median_s)

        measure.gemm_times = gemm_times
    none(cfg, info)


def stopped(cfg: Config, info: RankInfo) -> None:
    """Nine tenths of the time it is stopped, and runs for longer at a stretch than a product takes."""
    if info.rank == BROKEN:
        steps = (("SIGSTOP", 0.45), ("SIGCONT", 0.05))
        cycle = [f" os.kill(pid, signal.{name}); time.sleep({seconds})\n" for name, seconds in steps]
        script = "import os, signal, sys, time; pid = int(sys.argv[1])\nwhile True:\n" + "".join(cycle)
        subprocess.Popen([sys.executable, "-c", script, str(os.getpid())], stderr=subprocess.DEVNULL)
    none(cfg, info)


def crowded(cfg: Config, info: RankInfo) -> None:
    """Other processes compute on the cores, more of them on those of one rank."""
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[info.rank % 2]})
    script = "import os, sys\nwhile os.path.exists(f'/proc/{sys.argv[1]}/exe'): sum(range(100000))"
    for _ in range(3 if info.rank == BROKEN else 0):
        subprocess.Popen([sys.executable, "-c", script, str(os.getpid())], stderr=subprocess.DEVNULL)
    none(cfg, info)


def storage(cfg: Config, info: RankInfo) -> None:
    measure._PATIENCE_S = 0.5
    if info.rank == BROKEN:
        cfg.run_dir += "_of_another_node"
    none(cfg, info)


if __name__ == "__main__":
    forkserver.PRELOAD = ("torch",)
    main.main(f"tests.launch.preflight.faults:{sys.argv.pop(1)}")
