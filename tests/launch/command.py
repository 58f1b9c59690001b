"""`moe-train` with a fake job in place of training: python -m tests.launch.command FUNCTION OVERRIDE..."""

from __future__ import annotations

import os
import sys

from launch import forkserver, local, main
from launch.preflight import facts
from moe_train.data import prepare

if __name__ == "__main__":
    prepare.check_prepared = lambda *_: None  # the fake jobs read no data
    local.ENTRY = f"tests.launch.fake_job:{sys.argv.pop(1)}"
    forkserver.PRELOAD = ("torch",)  # all that the fake jobs need
    if os.environ.get("SLURM_PROCID") in os.environ.get("TEST_ODD_RANKS", "").split(","):
        facts.code_digest = lambda: "0123456789ab"
    main.main()
