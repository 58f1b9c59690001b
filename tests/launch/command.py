"""`moe-train` with a fake job in place of training: python -m tests.launch.command FUNCTION OVERRIDE..."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from launch import main
from launch.local import forkserver, launcher, signals
from launch.preflight import facts
from moe_train.data import prepare
from tests.launch.programs import wait_for


class Lingering:
    """Keeps the interpreter from ending for a while, once its signal handlers are gone, which `file` then says."""

    def __init__(self, file: Path, seconds: float = 0.5) -> None:
        self.seconds, self.sleep, self.touch = seconds, time.sleep, file.touch

    def __del__(self) -> None:
        self.touch()
        self.sleep(self.seconds)


if __name__ == "__main__":
    if "TEST_LINGER" in os.environ:
        sys.modules["lingering"] = Lingering(Path(os.environ["TEST_LINGER"]))  # type: ignore[assignment]
    prepare.check_prepared = lambda *_: None  # the fake jobs read no data
    prepare.examine = lambda *_, **__: []
    if "TEST_WARNED_BEFORE" in os.environ:
        prepare.check_prepared = lambda *_: os.kill(os.getpid(), signals.WARNING)
    if "TEST_GATE" in os.environ:
        prepare.check_prepared = lambda *_: wait_for(Path(os.environ["TEST_GATE"]).exists, 90)
    launcher.ENTRY = f"tests.launch.fake_job:{sys.argv.pop(1)}"
    forkserver.PRELOAD = ("torch",)  # all that the fake jobs need
    if os.environ.get("SLURM_PROCID") in os.environ.get("TEST_ODD_RANKS", "").split(","):
        facts.code_digest = lambda: "0123456789ab"
    main.main()
