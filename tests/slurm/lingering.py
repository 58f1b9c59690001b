"""`moe-train` that takes long to end: python -m tests.slurm.lingering OVERRIDE..., with TEST_LINGER=FILE."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from launch import main
from tests.launch.command import Lingering

if __name__ == "__main__":
    sys.modules["lingering"] = Lingering(Path(os.environ["TEST_LINGER"]), seconds=20)  # type: ignore[assignment]
    main.main()
