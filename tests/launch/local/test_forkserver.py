"""The server that forks ranks: what it has imported when the first rank starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
PROGRAM = """
import multiprocessing, sys
sys.path[:0] = sys.argv[1:]
from launch.local import forkserver

forkserver.PRELOAD = ("found_on_sys_path_only",)

def imported():
    sys.exit("found_on_sys_path_only" not in sys.modules)

if __name__ == "__main__":
    forkserver.begin()
    process = multiprocessing.get_context("forkserver").Process(target=imported)
    process.start()
    process.join()
    sys.exit(process.exitcode)
"""


def test_the_server_imports_from_where_its_parent_does(tmp_path: Path) -> None:
    """Python skips a preload that is not found, silently. The path of an installed package is in sys.path only."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "found_on_sys_path_only.py").write_text("")
    (tmp_path / "program.py").write_text(PROGRAM)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "program.py", str(ROOT), str(tmp_path / "elsewhere")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
