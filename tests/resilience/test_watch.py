"""The watchdog: when it fires, what it leaves behind, and which rank it blames."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from moe_train.resilience import watch
from moe_train.resilience.watch import Heartbeat, verdict
from parallel.exit_codes import ExitCode
from tests.launch import programs


def start(program: str, run_dir: Path) -> subprocess.CompletedProcess[str]:
    """Run a program whose rank 3 is watched with a limit of half a second."""
    head = """
        import sys, time
        from pathlib import Path
        from moe_train.resilience.watch import Pulse, Watch
        pulse, counts, limit = Pulse(), True, 0.5
        watched = Watch(pulse, Path(sys.argv[1]), 3, 4, lambda: limit, lambda: counts)
        watched.start()
    """
    text = textwrap.dedent(head) + textwrap.dedent(program)
    return subprocess.run(
        [sys.executable, "-c", text, str(run_dir)], cwd=programs.ROOT, env=programs.environment(), text=True,
        capture_output=True, timeout=60,
    )  # fmt: skip


def test_a_rank_without_progress_leaves_its_stacks_and_ends_itself(tmp_path: Path) -> None:
    done = start(
        """
        def deep_inside():
            time.sleep(60)
        pulse.beat(7, "update")
        deep_inside()
        """,
        tmp_path,
    )
    assert done.returncode == ExitCode.HUNG == 4
    assert "rank 3 made no progress for 0." in done.stderr
    assert "in step 8, update" in done.stderr
    stacks = (tmp_path / "logs/hang_rank_3.txt").read_text()
    assert "in deep_inside" in stacks
    assert stacks.count("hread 0x") >= 2  # every thread, the watchdog's too
    assert "hangs in step 8, update, in deep_inside (" in (tmp_path / watch.VERDICT).read_text()


def test_ranks_of_an_earlier_start_are_not_blamed(tmp_path: Path) -> None:
    """It had more of them: their files are still there, and of silent ranks. Rank 2 is of this start."""
    (tmp_path / "heartbeats").mkdir()
    for rank in (2, 4, 5):
        (tmp_path / f"heartbeats/rank_{rank}.json").write_text(json.dumps(asdict(beat(rank, stuck=False))))
    assert start("time.sleep(60)", tmp_path).returncode == ExitCode.HUNG
    told = "rank 2 (gpu2) gives no sign of life, last seen after step 4"
    assert (tmp_path / watch.VERDICT).read_text() == f"{told}\n"


def test_stacks_go_to_the_standard_error_where_run_dir_takes_none(tmp_path: Path) -> None:
    (tmp_path / "logs").touch()
    done = start("time.sleep(60)", tmp_path)
    assert done.returncode == ExitCode.HUNG
    assert "--- rank 3 made no progress for 0." in done.stderr
    assert "in <module>" in done.stderr


def test_other_ranks_see_how_far_a_rank_has_come(tmp_path: Path) -> None:
    """Also where nothing has made run_dir before."""
    pulse, run_dir = watch.Pulse(), tmp_path / "runs/new"
    watched = watch.Watch(pulse, run_dir, 1, 2, lambda: 1.0, lambda: True)
    watched.start()
    (first,) = watch.read(run_dir)
    assert (first.rank, first.step, first.count, first.place, first.stuck) == (1, 0, 0, "start", False)
    for _ in range(2):
        pulse.beat(5, "update")
    deadline = time.monotonic() + 20
    while (found := watch.read(run_dir)[0]).step == 0 and time.monotonic() < deadline:
        pulse.beat(5, "update")
        time.sleep(0.05)
    watched.stop()
    assert (found.step, found.place, found.stuck) == (5, "update", False)
    assert found.count >= 2


def test_a_full_disk_does_not_keep_a_hung_rank(tmp_path: Path) -> None:
    done = start(
        """
        import os
        def full(*_):
            raise OSError(28, "No space left on device")
        os.write = full
        time.sleep(5)
        """,
        tmp_path,
    )
    assert done.returncode == ExitCode.HUNG


def test_progress_and_jumps_of_the_clock_leave_it_alone(tmp_path: Path) -> None:
    done = start(
        """
        wall = time.time
        jump = 0.0
        time.time = lambda: wall() + jump
        for i in range(12):
            jump = 1e6 * (-1) ** i
            pulse.beat(i, "forward")
            time.sleep(0.1)
        watched.stop()
        """,
        tmp_path,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert [h.rank for h in watch.read(tmp_path)] == [3]
    assert list((tmp_path / "logs").iterdir()) == []


def test_the_end_of_what_may_take_longer_is_a_new_start(tmp_path: Path) -> None:
    done = start(
        """
        limit = 30.0
        time.sleep(1.5)
        limit = 0.5
        for i in range(5):
            time.sleep(0.25)
            pulse.beat(i, "forward")
        watched.stop()
        """,
        tmp_path,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_process_that_was_suspended_is_not_taken_for_hung(tmp_path: Path) -> None:
    done = start(
        """
        import os, subprocess
        resume = f"sleep 1.5; kill -CONT {os.getpid()}"
        for i in range(3):
            pulse.beat(i, "forward")
            if i == 1:
                subprocess.Popen(["sh", "-c", resume])
                os.kill(os.getpid(), 19)
            time.sleep(0.15)
        watched.stop()
        """,
        tmp_path,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_share_of_time_that_is_its_own(tmp_path: Path) -> None:
    pulse = watch.Pulse()
    watched = watch.Watch(pulse, tmp_path, 0, 1, lambda: 0.0, lambda: True)
    waiting: dict[str, Any] = {"sleep": time.sleep}
    source = compile("def all_reduce():\n    sleep(0.6)\n", "/lib/torch/distributed/c10d.py", "exec")
    exec(source, waiting)
    watched.start()
    time.sleep(0.6)
    own = watched.own_share()
    waiting["all_reduce"]()
    others = watched.own_share()
    watched.stop()
    assert own == 1.0
    assert others is not None
    assert others <= 0.35  # one look may fall between
    assert watched.own_share() is None


def test_time_that_belongs_to_no_step_is_not_counted(tmp_path: Path) -> None:
    watched = watch.Watch(watch.Pulse(), tmp_path, 0, 1, lambda: 0.0, lambda: False)
    watched.start()
    time.sleep(0.3)
    watched.stop()
    assert watched.own_share() is None


def test_a_place_is_the_innermost_function_and_the_innermost_of_this_project() -> None:
    assert watch.where(None) == "ended"
    frame = sys._getframe()
    own = "test_a_place_is_the_innermost_function_and_the_innermost_of_this_project (resilience/test_watch.py:"
    assert watch.where(frame).startswith(own)
    assert " from " not in watch.where(frame)
    library: dict[str, Any] = {"where": lambda: watch.where(sys._getframe(1))}
    exec(compile("def wait():\n    return where()\n", "/lib/torch/futures.py", "exec"), library)
    assert library["wait"]().startswith(f"wait (torch/futures.py:2) from {own}")


def beat(rank: int, **changes: Any) -> Heartbeat:
    """Of a rank that waits for others."""
    facts: dict[str, Any] = {
        "rank": rank, "host": f"gpu{rank}", "pid": 1, "step": 4, "count": 9, "place": "update", "stuck": True,
        "waits": True, "at": "all_reduce (distributed/c10d.py:1)",
    }  # fmt: skip
    return Heartbeat(**facts | changes)


@pytest.mark.parametrize("damage", ["[" * 100_000, "[]", '{"rank": 1}', "step", ""])
def test_damaged_heartbeats_are_left_out(damage: str, tmp_path: Path) -> None:
    (tmp_path / "heartbeats").mkdir()
    for rank in (0, 1):
        facts = asdict(beat(rank)) | ({"step": "4"} if rank and damage == "step" else {})
        text = damage if rank and damage != "step" else json.dumps(facts)
        (tmp_path / f"heartbeats/rank_{rank}.json").write_text(text)
    assert watch.read(tmp_path) == [beat(0)]


def test_a_silent_rank_is_blamed_first() -> None:
    ranks = [beat(0), beat(1, stuck=False, step=3), beat(2, waits=False)]
    assert verdict(ranks) == ["rank 1 (gpu1) gives no sign of life, last seen after step 3"]


def test_then_the_one_that_does_not_wait_for_others() -> None:
    ranks = [beat(0), beat(1), beat(2, waits=False, at="read (data.py:3)")]
    assert verdict(ranks) == ["rank 2 (gpu2) hangs in step 5, update, in read (data.py:3)"]


def test_then_those_that_came_least_far() -> None:
    assert [line.split()[1] for line in verdict([beat(0), beat(1, count=8), beat(2)])] == ["1"]
    assert len(verdict([beat(0), beat(1)])) == 2
