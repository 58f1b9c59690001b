from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from moe_train.data import lock
from parallel.errors import DataError

HOLD = """
import sys, time
from pathlib import Path
from moe_train.data import lock
with lock.only_one(Path(sys.argv[1]), print):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def hold(directory: Path, seconds: float) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(directory), str(seconds)],
        cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout
    assert process.stdout.readline() == "held\n"
    return process


def test_the_lock_is_free_as_soon_as_its_owner_is_killed(tmp_path: Path) -> None:
    owner = hold(tmp_path, 60)
    owner.kill()
    owner.wait()
    with lock.only_one(tmp_path, lambda line: pytest.fail(line)):
        assert json.loads((tmp_path / lock.NAME).read_text())["pid"] == os.getpid()
    assert (tmp_path / lock.NAME).read_text() == ""


def test_an_owner_that_is_stopped_is_waited_for_and_then_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "STALE_S", 0.5)
    owner = hold(tmp_path, 60)
    lines: list[str] = []
    try:
        owner.send_signal(signal.SIGSTOP)
        stopped = rf"process {owner.pid} on .* has not run for 0 s; end it"
        with pytest.raises(DataError, match=stopped), lock.only_one(tmp_path, lines.append):
            pytest.fail("two processes have the lock")
    finally:
        owner.kill()
        owner.wait()
    assert lines == [f"waiting for process {owner.pid} on {socket.gethostname()}, which is making data.dir={tmp_path}"]


def test_an_owner_on_another_node_is_seen_by_its_beat_where_flock_ends_at_the_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here it stops after a while, as a node does that is lost."""
    monkeypatch.setattr(lock, "BEAT_S", 1.0)
    monkeypatch.setattr(lock, "STALE_S", 30)
    path = tmp_path / lock.NAME
    path.write_text(json.dumps({"host": "elsewhere", "pid": 1, "job": "77"}))
    beat = subprocess.Popen(["bash", "-c", f"for i in $(seq 15); do sleep 0.1; touch {path}; done"])
    began, lines = time.monotonic(), []
    with lock.only_one(tmp_path, lines.append):
        assert time.monotonic() - began > 1
        assert json.loads(path.read_text())["host"] == socket.gethostname()
    beat.wait()
    assert lines[0].startswith("waiting for process 1 on elsewhere of job 77")


@pytest.mark.parametrize("text", ['{"host": "elsewhere", "pid": 1}', "[" * 100_000, '{"host": 1, "pid": 1}', "null"])
def test_a_lock_that_an_older_version_or_a_crash_left_is_taken(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "BEAT_S", 0.1)
    (tmp_path / lock.NAME).write_text(text)
    with lock.only_one(tmp_path, lambda line: pytest.fail(line)):
        assert json.loads((tmp_path / lock.NAME).read_text())["pid"] == os.getpid()


def test_text_of_a_lock_cannot_control_the_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_try", lambda _: None)
    monkeypatch.setattr(lock, "STALE_S", 0)
    (tmp_path / lock.NAME).write_text(json.dumps({"host": "a\x1b[2J\n", "pid": 1, "job": "7\x07" + "x" * 5_000}))
    with pytest.raises(DataError) as error, lock.only_one(tmp_path, lambda _: None):
        pytest.fail("another process has the lock")
    assert error.value.cause.startswith(r"process 1 on a\x1b[2J\n of job 7\x07xxx")
    assert len(error.value.cause) < 1_000
    lines: list[str] = []
    monkeypatch.setattr(lock, "STALE_S", 0.1)
    with pytest.raises(DataError), lock.only_one(tmp_path, lines.append):
        pytest.fail("another process has the lock")
    assert all(line.isprintable() and len(line) < 1_000 for line in lines)
    assert len(lines) == 1


@pytest.mark.parametrize("kind", ["link", "link to nothing", "pipe", "directory"])
def test_only_a_file_is_taken_for_a_lock(kind: str, tmp_path: Path) -> None:
    """A lock is emptied at the end, and a link could lead to any file."""
    path, other = tmp_path / lock.NAME, tmp_path / "other"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to(other)
        if kind == "link":
            other.write_text("precious")
    with (
        pytest.raises(DataError, match=r"\.lock is a link, a pipe or a directory") as error,
        lock.only_one(tmp_path, print),
    ):
        pytest.fail("this is not a lock")
    assert error.value.remedy == f"remove {path}"
    assert other.exists() == (kind == "link")
    assert kind != "link" or other.read_text() == "precious"


def test_a_lock_without_a_thread_for_its_heartbeat_is_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", start)
        with pytest.raises(DataError, match="needs a thread: can't start new thread"), lock.only_one(tmp_path, print):
            pytest.fail("it has no heartbeat")
    with lock.only_one(tmp_path, lambda line: pytest.fail(line)):
        pass
