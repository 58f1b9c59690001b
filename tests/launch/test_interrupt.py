"""However a job is told to end, its ranks are gone within 5 s, and nothing of it is left."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.launch import commands

LIMIT_S = 5


def _runs(pid: int) -> bool:
    """Whether a process does anything. One that has ended may wait long for a parent that asks how."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _gone(run_dir: Path, process: subprocess.Popen[str]) -> None:
    ranks = [int(file.read_text()) for file in run_dir.glob("hanging_*")]
    commands.wait_for(lambda: not any(map(_runs, ranks)), LIMIT_S)
    # The launcher itself may need longer where many tests share few cores.
    commands.wait_for(lambda: process.poll() is not None and not commands.alive(process.pid), 30)


@pytest.mark.parametrize(
    ("number", "whole_group", "function"),
    [
        (signal.SIGINT, False, "hang"),
        (signal.SIGINT, True, "hang"),  # Ctrl-C in a terminal
        (signal.SIGTERM, False, "hang_stubbornly"),
        (signal.SIGTERM, True, "hang"),
    ],
)
def test_a_signal_ends_every_rank(tmp_path: Path, number: signal.Signals, whole_group: bool, function: str) -> None:
    with commands.hanging(function, tmp_path, 2) as process:
        assert len(commands.alive(process.pid)) >= 3
        (os.killpg if whole_group else os.kill)(process.pid, number)
        _gone(tmp_path, process)
        assert process.returncode == 128 + number
        output, errors = process.communicate()
        assert errors.strip() == f"interrupted by {number.name}; every rank has ended"
        assert "Traceback" not in output


@pytest.mark.parametrize("pause_s", [0, 0.005])
def test_a_storm_of_signals_ends_every_rank_like_one(tmp_path: Path, pause_s: float) -> None:
    """Also where it lasts until the launcher is gone."""
    with commands.hanging("hang", tmp_path, 2) as process:
        for i in range(60 if not pause_s else 10_000):
            if process.poll() is not None:
                break
            os.killpg(process.pid, signal.SIGINT if i % 2 else signal.SIGTERM)
            time.sleep(pause_s)
        _gone(tmp_path, process)
        errors = process.communicate()[1]
        assert process.returncode in (128 + signal.SIGINT, 128 + signal.SIGTERM)
        assert "Traceback" not in errors
        assert errors.strip().endswith("every rank has ended")


def test_sigusr1_lets_ranks_stop_by_themselves(tmp_path: Path) -> None:
    """The launcher passes it on; the exit code says that the run can continue."""
    with commands.hanging("until_told", tmp_path, 2) as process:
        os.kill(process.pid, signal.SIGUSR1)
        _gone(tmp_path, process)
        assert process.returncode == 75
        assert process.communicate()[1] == ""


def test_ranks_end_when_the_launcher_is_killed(tmp_path: Path) -> None:
    with commands.hanging("hang", tmp_path, 2) as process:
        process.kill()
        _gone(tmp_path, process)


def test_ctrl_c_while_modules_are_imported(tmp_path: Path) -> None:
    with commands.started("hang", tmp_path, 2) as process:
        commands.wait_for(lambda: len(commands.alive(process.pid)) >= 3, 20)  # the fork server and resource tracker
        os.killpg(process.pid, signal.SIGINT)
        _gone(tmp_path, process)
        assert process.returncode == 128 + signal.SIGINT
        assert "Traceback" not in process.communicate()[1]
