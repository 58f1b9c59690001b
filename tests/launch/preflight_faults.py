"""`moe-preflight` with a fault on one rank: python -m tests.launch.preflight_faults FAULT OVERRIDE..."""

from __future__ import annotations

import sys
from dataclasses import replace

from launch import forkserver, main
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
    before = measure.matmul
    if info.rank == BROKEN:
        measure.matmul = lambda *args: 1000 * before(*args)
    none(cfg, info)


def storage(cfg: Config, info: RankInfo) -> None:
    measure._PATIENCE_S = 0.5
    if info.rank == BROKEN:
        cfg.run_dir += "_of_another_node"
    none(cfg, info)


if __name__ == "__main__":
    forkserver.PRELOAD = ("torch",)
    sys.exit(main.run(f"tests.launch.preflight_faults:{sys.argv.pop(1)}"))
