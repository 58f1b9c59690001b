"""`moe-train` with a fake job in place of training: python -m tests.launch.command FUNCTION OVERRIDE..."""

from __future__ import annotations

import sys

from launch import forkserver, local, main
from moe_train.data import prepare

if __name__ == "__main__":
    prepare.check_prepared = lambda *_: None  # the fake jobs read no data
    local.ENTRY = f"tests.launch.fake_job:{sys.argv.pop(1)}"
    forkserver.PRELOAD = ("torch",)  # all that the fake jobs need
    main.main()
