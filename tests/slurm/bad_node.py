"""`moe-preflight` that finds the memory of node1 taken: python -m tests.slurm.bad_node OVERRIDE..."""

from __future__ import annotations

from launch import main
from launch.preflight import facts, rank
from moe_train.config.schema import Config
from parallel.rank_info import RankInfo


def run(cfg: Config, info: RankInfo) -> None:
    if facts.node_name() == "node1":
        facts.memory_free = lambda: 0.01
    rank.run(cfg, info)


if __name__ == "__main__":
    main.main("tests.slurm.bad_node:run")
