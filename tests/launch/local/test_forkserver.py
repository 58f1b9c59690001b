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

WAITS = """
import multiprocessing, os
from multiprocessing import forkserver as stock
from launch.local import forkserver

forkserver.PRELOAD = ()
pids, start = [], multiprocessing.process.BaseProcess.start

def counted(self):
    start(self)
    pids.append(stock._forkserver._forkserver_pid)

if __name__ == "__main__":
    multiprocessing.process.BaseProcess.start = counted
    forkserver.wait()
    forkserver.wait()
    assert len(pids) == 1, pids
    os.kill(pids[0], 9)
    os.waitid(os.P_PID, pids[0], os.WEXITED | os.WNOWAIT)
    forkserver.wait()
    assert len(set(pids)) == 2, pids
    forkserver.kill()
    os.waitid(os.P_PID, pids[1], os.WEXITED | os.WNOWAIT)
    forkserver.wait()
    assert len(set(pids)) == len(pids) == 3, pids
"""


def test_a_server_is_asked_once_whether_it_is_ready(tmp_path: Path) -> None:
    """And again where another one has taken its place."""
    (tmp_path / "program.py").write_text(WAITS)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "program.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_server_imports_from_where_its_parent_does(tmp_path: Path) -> None:
    """Python skips a preload that is not found, silently. The path of an installed package is in sys.path only."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "found_on_sys_path_only.py").write_text("")
    (tmp_path / "program.py").write_text(PROGRAM)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "program.py", str(ROOT), str(tmp_path / "elsewhere")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
