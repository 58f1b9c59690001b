"""However a job is told to end, its ranks are gone within 5 s, and nothing of it is left."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from functools import partial
from pathlib import Path

import psutil
import pytest

from launch.local import signals
from tests import forked
from tests.launch import programs

LIMIT_S = 5


def _runs(pid: int) -> bool:
    """Whether a process does anything. One that has ended may wait long for a parent that asks how."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _gone(run_dir: Path, process: subprocess.Popen[str]) -> None:
    ranks = [int(file.read_text()) for file in run_dir.glob("hanging_*")]
    programs.wait_for(lambda: not any(map(_runs, ranks)), LIMIT_S)
    # The launcher itself may need longer where many tests share few cores.
    programs.wait_for(lambda: process.poll() is not None and not programs.alive(process.pid), 30)


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
    with programs.hanging(function, tmp_path, 2) as process:
        assert len(programs.alive(process.pid)) >= 3
        (os.killpg if whole_group else os.kill)(process.pid, number)
        _gone(tmp_path, process)
        assert process.returncode == 128 + number
        output, errors = process.communicate()
        assert errors.strip() == f"interrupted by {number.name}; every rank has ended"
        assert "Traceback" not in output


@pytest.mark.parametrize("pause_s", [0, 0.005])
def test_a_storm_of_signals_ends_every_rank_like_one(tmp_path: Path, pause_s: float) -> None:
    """Also where it lasts until the launcher is gone."""
    with programs.hanging("hang", tmp_path, 2) as process:
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


@pytest.mark.parametrize("whole_group", [False, True])
def test_sigusr1_lets_ranks_stop_by_themselves(whole_group: bool, tmp_path: Path) -> None:
    """The launcher passes it on; the exit code says that the run can continue. Slurm sends it to all processes."""
    with programs.hanging("until_told", tmp_path, 2) as process:
        (os.killpg if whole_group else os.kill)(process.pid, signal.SIGUSR1)
        _gone(tmp_path, process)
        assert process.returncode == 75
        assert process.communicate()[1] == ""


def test_ranks_end_when_the_launcher_is_killed(tmp_path: Path) -> None:
    with programs.hanging("hang", tmp_path, 2) as process:
        process.kill()
        _gone(tmp_path, process)


def test_ctrl_c_while_modules_are_imported(tmp_path: Path) -> None:
    with programs.started("hang", tmp_path, 2, start=subprocess.Popen) as process:
        programs.wait_for(lambda: len(programs.alive(process.pid)) >= 3, 90)  # the fork server and resource tracker
        os.killpg(process.pid, signal.SIGINT)
        _gone(tmp_path, process)
        assert process.returncode == 128 + signal.SIGINT
        assert "Traceback" not in process.communicate()[1]


def test_sigusr1_before_ranks_are_started_ends_the_job_as_saved(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with programs.started("hang", tmp_path / "run", 2, start=subprocess.Popen, TEST_GATE=str(gate)) as process:
        programs.wait_for(lambda: len(programs.alive(process.pid)) >= 3, 90)
        os.killpg(process.pid, signal.SIGUSR1)
        gate.touch()  # the launcher starts no rank before
        _gone(tmp_path, process)
        assert process.returncode == 75
        told = process.communicate()[1].strip()
        assert told == "stopped by SIGUSR1 before the first step; the same command continues"


@pytest.mark.parametrize(
    "before", [("nohup",), ("sh", "-c", 'trap "" INT HUP TERM; exec "$0" "$@"')], ids=["nohup", "background"]
)
def test_a_signal_that_was_ignored_before_stays_ignored(before: tuple[str, ...], tmp_path: Path) -> None:
    """`nohup` ignores SIGHUP, and a shell without job control SIGINT in its background jobs."""
    with programs.hanging("until_told", tmp_path, 2, before) as process:
        for number in signals.ENDING if "sh" in before else (signal.SIGHUP,):
            os.killpg(process.pid, number)
        time.sleep(0.5)
        assert process.poll() is None, process.communicate()
        os.kill(process.pid, signal.SIGUSR1)  # it is still heard
        _gone(tmp_path, process)
        assert process.returncode == 75


_RANK = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


@pytest.mark.parametrize("number", [*signals.ENDING, signal.SIGUSR1])
@pytest.mark.parametrize("variables", [{}, _RANK], ids=["moe-train", "rank"])
def test_a_signal_after_the_end_changes_no_exit_code(
    variables: dict[str, str], number: signal.Signals, tmp_path: Path
) -> None:
    """The interpreter takes a while to end, and has no handlers by then."""
    file = tmp_path / "lingering"
    start = partial(forked.Popen, whole_end=True)
    with programs.started("report", tmp_path, 1, start=start, TEST_LINGER=str(file), **variables) as process:
        programs.wait_for(lambda: file.exists() or process.poll() is not None, 90)
        os.kill(process.pid, number)
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 0, errors
