"""`moe-train` with steps of a second, so that there is time to disturb it: python -m tests.slurm.slowly OVERRIDE..."""

from __future__ import annotations

import time
from typing import Any

from launch import main
from launch.local import launcher
from moe_train.config.schema import Config
from parallel.rank_info import RankInfo

STEP_S = 1.0


def run(cfg: Config, info: RankInfo) -> None:
    from moe_train import train
    from moe_train.loop import step

    before = step.train_step

    def train_step(*args: Any) -> Any:
        time.sleep(STEP_S)
        return before(*args)

    step.train_step = train_step
    train.run(cfg, info)


if __name__ == "__main__":
    launcher.ENTRY = "tests.slurm.slowly:run"  # not as an entry of `main`, which would leave out the lock of run_dir
    main.main()
