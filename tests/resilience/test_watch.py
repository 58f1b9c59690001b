"""The watchdog: when it fires, what it leaves behind, and which rank it blames."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

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
        from moe_train.resilience.watch import ProgressMarker, Watch
        pulse, counts, limit = ProgressMarker(), True, 0.5
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
        pulse.mark(7, "update")
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
    told = "rank 2 (gpu2) sends no heartbeat, last seen after step 4"
    assert (tmp_path / watch.VERDICT).read_text() == f"{told}\n"


def test_stacks_go_to_the_standard_error_where_run_dir_takes_none(tmp_path: Path) -> None:
    (tmp_path / "logs").touch()
    done = start("time.sleep(60)", tmp_path)
    assert done.returncode == ExitCode.HUNG
    assert "--- rank 3 made no progress for 0." in done.stderr
    assert "in <module>" in done.stderr


def test_other_ranks_see_how_far_a_rank_has_come(tmp_path: Path) -> None:
    """Also where nothing has made run_dir before."""
    pulse, run_dir = watch.ProgressMarker(), tmp_path / "runs/new"
    watched = watch.Watch(pulse, run_dir, 1, 2, lambda: 1.0, lambda: True)
    watched.start()
    (first,) = watch.read(run_dir)
    assert (first.rank, first.step, first.count, first.place, first.stuck) == (1, 0, 0, "start", False)
    for _ in range(2):
        pulse.mark(5, "update")
    deadline = time.monotonic() + 20
    while (found := watch.read(run_dir)[0]).step == 0 and time.monotonic() < deadline:
        pulse.mark(5, "update")
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
            pulse.mark(i, "forward")
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
            pulse.mark(i, "forward")
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
            pulse.mark(i, "forward")
            if i == 1:
                subprocess.Popen(["sh", "-c", resume])
                os.kill(os.getpid(), 19)
            time.sleep(0.15)
        watched.stop()
        """,
        tmp_path,
    )
    assert (done.returncode, done.stderr) == (0, "")


class Script:
    """Runs a watch in this thread, on a clock of its own. Nothing ends the process.

    Attributes:
        now: seconds since the start.
        limit: what the watch is told.
        ended: when it gave up, after how long a silence and with what grace; None if it did not.
        armed: when faulthandler was told to end the process, and in how many seconds.
        written: when a heartbeat was written, and its step.
    """

    def __init__(self, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.limit = 0.0, 0.0
        self.ended: tuple[float, float, float] | None = None
        self.armed, self.written = list[tuple[float, float]](), list[tuple[float, int]]()
        self.pulse = watch.ProgressMarker()
        self.watched = watch.Watch(self.pulse, run_dir, 3, 4, lambda: self.limit, lambda: True)
        (run_dir / "logs").mkdir()
        monkeypatch.setattr(watch, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(watch.faulthandler, "dump_traceback_later", self._arm)
        monkeypatch.setattr(self.watched, "_give_up", self._give_up)
        monkeypatch.setattr(self.watched, "_write", lambda mine: self.written.append((self.now, mine.step)))
        monkeypatch.setattr(self.watched, "_end", self)

    def run(self, *actions: Any, looks: int | None = None, every_s: float = 1.0) -> float | None:
        """`actions` happen after the first, second, ... `every_s`. Returns when the watch gave up."""
        self._actions, self._every_s = iter([*actions, *[None] * ((looks or len(actions)) - len(actions))]), every_s
        self.watched.run()
        return None if self.ended is None else self.ended[0]

    def wait(self, seconds: float) -> bool:
        """In place of the event that ends the thread."""
        assert seconds == 0.1
        if self.ended:
            return True
        try:
            action = next(self._actions)
        except StopIteration:
            return True
        self.now += self._every_s
        if action is not None:
            action()
        return False

    def beat(self, step: int = 0) -> None:
        self.pulse.mark(step, "forward")

    def set(self, limit: float) -> None:
        self.limit = limit

    def _arm(self, seconds: float, exit: bool, file: Any) -> None:
        assert exit, "a rank that native code keeps must end"
        assert file.name.endswith("hang_rank_3.txt")
        self.armed.append((self.now, seconds))

    def _give_up(self, silent_s: float, grace_s: float, stacks: int) -> None:
        self.ended = (self.now, silent_s, grace_s)


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Script:
    return Script(tmp_path, monkeypatch)


@pytest.mark.parametrize(("limit", "grace"), [(10.0, 2.5), (200.0, 30.0)])
def test_a_rank_is_given_up_once_it_is_silent_for_longer_than_the_limit(
    limit: float, grace: float, script: Script
) -> None:
    """The last beat after 2 s."""
    script.limit = limit
    assert script.run(None, script.beat, looks=300) == limit + 3
    assert script.ended == (limit + 3, limit + 1, grace)


def test_a_jump_of_the_clock_counts_as_a_quarter_of_the_limit(script: Script) -> None:
    script.limit = 4.0
    assert script.run(looks=300, every_s=1000.0) == 5000.0
    assert script.ended == (5000.0, 5.0, 1.0)


def test_looks_that_are_late_count_in_full_where_the_limit_is_short(script: Script) -> None:
    """A look every 0.2 s: more than a quarter of the limit."""
    script.limit = 0.5
    assert script.run(looks=20, every_s=0.2) == pytest.approx(0.6)


def test_a_shorter_limit_is_a_new_start_and_a_longer_one_is_not(script: Script) -> None:
    script.limit = 40.0
    assert script.run(*[None] * 29, lambda: script.set(10.0), looks=60) == 30 + 11
    script.ended, script.limit = None, 10.0
    start = script.now
    assert script.run(*[None] * 7, lambda: script.set(20.0), looks=60) == start + 21


def test_without_a_limit_nothing_ends_until_there_is_one(script: Script) -> None:
    assert script.run(*[None] * 99, lambda: script.set(10.0), looks=300) == 110
    assert [when for when, _ in script.armed] == [100, 103, 106, 109]


def test_faulthandler_ends_a_rank_that_native_code_keeps(script: Script) -> None:
    """Told again after each quarter of the limit, and at once where the limit changes."""
    script.limit = 8.0
    beats = [lambda: script.beat(5)] * 8

    def slower() -> None:
        script.limit = 12.0
        script.beat(6)

    assert script.run(*beats, slower, *beats) is None
    assert script.armed == [(1, 76), (4, 76), (7, 76), (9, 84), (13, 84), (17, 84)]
    assert script.written == [(1, 5), (9, 6), (13, 5)], "a step is told once, when faulthandler is"


def test_stacks_that_are_empty_are_removed(script: Script, tmp_path: Path) -> None:
    stacks = tmp_path / "logs/hang_rank_3.txt"
    script.run(looks=2)
    assert not stacks.exists()
    stacks.write_text("of an earlier start")
    script.run(looks=2)
    assert stacks.exists()


def test_the_thread_ends_with_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what faulthandler was told is taken back, also where a run ends without `stop`: the thread is a daemon."""
    calls: list[str] = []
    watched = watch.Watch(watch.ProgressMarker(), tmp_path, 0, 1, lambda: 1e6, lambda: True)
    assert watched.daemon
    monkeypatch.setattr(watch.faulthandler, "dump_traceback_later", lambda *_, **__: calls.append("later"))
    monkeypatch.setattr(watch.faulthandler, "cancel_dump_traceback_later", lambda: calls.append("cancel"))
    watched.start()
    deadline = time.monotonic() + 20
    while not calls and time.monotonic() < deadline:
        time.sleep(0.01)
    watched.stop()
    assert not watched.is_alive()
    assert calls == ["later", "cancel"]


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[watch.Watch, list[float], IO[str]]:
    """A watch of rank 1 in step 8, the pauses that it makes, and its file of stacks."""
    slept: list[float] = []
    for name in ("logs", "heartbeats"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(watch, "time", SimpleNamespace(sleep=slept.append))
    watched = watch.Watch(watch.ProgressMarker(), tmp_path, 1, 3, lambda: 1.0, lambda: True)
    watched.pulse.mark(7, "update")
    return watched, slept, (tmp_path / "logs/hang_rank_1.txt").open("a")


def test_what_a_rank_that_gives_up_leaves(
    told: tuple[watch.Watch, list[float], IO[str]], tmp_path: Path,
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Its own state is there before the others are looked at. Rank 2 is silent, and 3 is of an earlier start."""
    watched, slept, stacks = told
    for rank in (2, 3):
        text = json.dumps(asdict(beat(rank, stuck=False, step=6)))
        (tmp_path / f"heartbeats/rank_{rank}.json").write_text(text)
    with stacks:
        watched._report(3.21, 0.25, stacks.fileno())
    assert slept == [0.25]
    own, other, _ = watch.read(tmp_path)
    assert (own.rank, own.step, own.stuck, own.place) == (1, 7, True, "update")
    assert other.rank == 2
    head = "rank 1 made no progress for 3.2 s in step 8, update"
    found = "rank 2 (gpu2) sends no heartbeat, last seen after step 6"
    text = f"{head}; {found}; stacks in {tmp_path}/logs/hang_rank_1.txt"
    assert capsys.readouterr().err == f"error: {text}\n"
    assert caplog.messages == [text]
    assert (tmp_path / watch.VERDICT).read_text() == f"{found}\n"
    assert [path.name for path in tmp_path.glob("hung*")] == [watch.VERDICT]
    assert (tmp_path / "logs/hang_rank_1.txt").read_text().startswith(f"--- {head}\n")


def test_a_rank_ends_however_little_it_could_tell(
    told: tuple[watch.Watch, list[float], IO[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    watched, _, stacks = told
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    with stacks:
        watched._give_up(1.0, 0.0, stacks.fileno())
        monkeypatch.setattr(watched, "_write", None)
        with pytest.raises(TypeError):
            watched._give_up(1.0, 0.0, stacks.fileno())
    assert codes == [ExitCode.HUNG] * 2


def test_a_heartbeat_that_cannot_be_written_ends_nothing(
    told: tuple[watch.Watch, list[float], IO[str]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    watched, _, stacks = told
    stacks.close()
    (tmp_path / "heartbeats").rmdir()
    watched._write(watched._state(stuck=False))
    assert caplog.messages == [f"heartbeat: [Errno 2] No such file or directory: '{tmp_path}/heartbeats/rank_1.json'"]


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("/lib/torch/distributed/c10d.py", True),
        ("/lib/megatron/core/distributed/param_and_grad_buffer.py", True),
        ("/lib/megatron/core/pipeline_parallel/p2p_communication.py", True),
        ("/lib/torch/autograd/graph.py", False),
        ("/lib/megatron/core/tensor_parallel/layers.py", False),
    ],
)
def test_where_a_rank_waits_for_others(file: str, expected: bool) -> None:
    found: dict[str, Any] = {"frame": lambda: sys._getframe(1)}
    exec(compile("def call():\n    return frame()\n", file, "exec"), found)
    assert watch.waits(found["call"]()) is expected
    assert watch.waits(None) is False


def test_every_beat_is_progress() -> None:
    pulse = watch.ProgressMarker()
    for _ in range(3):
        pulse.mark(4, "forward")
    assert (pulse.step, pulse.count, pulse.place) == (4, 3, "forward")


def test_the_share_of_time_that_is_its_own(tmp_path: Path) -> None:
    pulse = watch.ProgressMarker()
    watched = watch.Watch(pulse, tmp_path, 0, 1, lambda: 0.0, lambda: True)
    waiting: dict[str, Any] = {"sleep": time.sleep}
    source = compile("def all_reduce():\n    sleep(0.6)\n", "/lib/torch/distributed/c10d.py", "exec")
    exec(source, waiting)
    watched.start()
    time.sleep(0.6)
    own = watched.busy_fraction()
    waiting["all_reduce"]()
    others = watched.busy_fraction()
    watched.stop()
    assert own == 1.0
    assert others is not None
    assert others <= 0.35  # one look may fall between
    assert watched.busy_fraction() is None


def test_time_that_belongs_to_no_step_is_not_counted(tmp_path: Path) -> None:
    watched = watch.Watch(watch.ProgressMarker(), tmp_path, 0, 1, lambda: 0.0, lambda: False)
    watched.start()
    time.sleep(0.3)
    watched.stop()
    assert watched.busy_fraction() is None


def test_a_place_is_the_innermost_function_and_the_innermost_of_this_project() -> None:
    assert watch.where(None) == "ended"
    frame = sys._getframe()
    own = "test_a_place_is_the_innermost_function_and_the_innermost_of_this_project (resilience/test_watch.py:"
    assert watch.where(frame).startswith(own)
    assert " from " not in watch.where(frame)
    library: dict[str, Any] = {"where": lambda: watch.where(sys._getframe(1))}
    exec(compile("def wait():\n    return where()\n", "/lib/torch/futures.py", "exec"), library)
    assert library["wait"]().startswith(f"wait (torch/futures.py:2) from {own}")


@pytest.mark.parametrize("package", ["moe_train", "parallel", "launch", "tests"])
def test_every_package_of_this_project_is_named_as_such(package: str) -> None:
    library: dict[str, Any] = {"where": lambda: watch.where(sys._getframe(1))}
    exec(compile("def wait():\n    return where()\n", "/lib/torch/futures.py", "exec"), library)
    exec(compile("def ours(call):\n    return call()\n", f"/code/{package}/sub/module.py", "exec"), library)
    assert library["ours"](library["wait"]) == "wait (torch/futures.py:2) from ours (sub/module.py:2)"


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


def test_heartbeats_are_read_in_the_order_of_ranks(tmp_path: Path) -> None:
    """Without those that are being written."""
    (tmp_path / "heartbeats").mkdir()
    for rank in (2, 10, 1, 0):
        (tmp_path / f"heartbeats/rank_{rank}.json").write_text(json.dumps(asdict(beat(rank))))
    (tmp_path / "heartbeats/.rank_0.json.0123456789abcdef.part").write_text(json.dumps(asdict(beat(0))))
    assert [found.rank for found in watch.read(tmp_path)] == [0, 1, 2, 10]
    (tmp_path / "heartbeats/rank_3.json").mkdir()
    assert [found.rank for found in watch.read(tmp_path)] == [0, 1, 2, 10]


def test_a_silent_rank_is_blamed_first() -> None:
    ranks = [beat(0), beat(1, stuck=False, step=3), beat(2, waits=False)]
    assert verdict(ranks) == ["rank 1 (gpu1) sends no heartbeat, last seen after step 3"]


def test_then_the_one_that_does_not_wait_for_others() -> None:
    ranks = [beat(0), beat(1), beat(2, waits=False, at="read (data.py:3)")]
    assert verdict(ranks) == ["rank 2 (gpu2) hangs in step 5, update, in read (data.py:3)"]


def test_then_those_that_came_least_far() -> None:
    assert [line.split()[1] for line in verdict([beat(0), beat(1, count=8), beat(2)])] == ["1"]
    assert len(verdict([beat(0), beat(1)])) == 2
    ranks = [beat(0, step=5, count=3), beat(1, step=4, count=9), beat(2, step=6, count=9)]
    assert [line.split()[1] for line in verdict(ranks)] == ["1"]
    assert verdict([]) == []
