"""The lock of a run directory: who gets it, who is refused, and what a killed run leaves."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from launch import lock
from moe_train.config.schema import Config
from parallel.errors import LaunchError
from tests.launch import programs

TIMEOUT_S = 5


@pytest.fixture(autouse=True)
def _no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(lock, "_POLL_S", 0.02)


def _left(run_dir: Path, **changes: object) -> Path:
    """A lock as a run of another machine would have left it."""
    owner = replace(lock._me(), host="elsewhere", kernel="another", pid=1, token="theirs", **changes)
    path = run_dir / lock.NAME
    path.write_text(json.dumps(asdict(owner)))
    return path


def _take(run_dir: Path, timeout_s: float = 0.2) -> str:
    """Take the lock and give it back; the host that was found in it meanwhile."""
    taken = lock.acquire(run_dir, timeout_s, lambda _: None)
    host: str = json.loads((run_dir / lock.NAME).read_text())["host"]
    taken.release()
    assert list(run_dir.iterdir()) == []
    return host


def test_a_second_run_is_refused_with_who_holds_the_directory(tmp_path: Path) -> None:
    taken = lock.acquire(tmp_path, TIMEOUT_S, lambda _: None)
    with pytest.raises(lock.InUseError) as refused:
        lock.acquire(tmp_path, TIMEOUT_S, lambda _: None)
    assert f"run_dir={tmp_path} is in use by process {os.getpid()} on " in refused.value.cause
    assert "last heartbeat 0 s ago" in refused.value.cause
    assert refused.value.remedy.endswith(f"if it has ended, remove {tmp_path}/run.lock")
    assert refused.value.exit_code == 2
    with pytest.raises(lock.InUseError):
        lock.refuse_live(Config(run_dir=str(tmp_path)))
    taken.release()
    lock.refuse_live(Config(run_dir=str(tmp_path)))
    assert _take(tmp_path) == lock._me().host


def test_a_killed_run_leaves_a_lock_that_the_next_one_takes_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = f"from launch import lock; from pathlib import Path; import time; lock.acquire(Path({str(tmp_path)!r}), 60, print); print('held', flush=True); time.sleep(60)"  # noqa: E501
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=programs.ROOT, stdout=subprocess.PIPE, env=programs.environment()
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    with pytest.raises(lock.InUseError, match=f"process {process.pid} on"):
        lock.acquire(tmp_path, TIMEOUT_S, lambda _: None)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert (tmp_path / lock.NAME).exists()
    began = time.monotonic()
    _take(tmp_path, timeout_s=60)
    assert time.monotonic() - began < 10
    assert "was left locked by process" in (told := capsys.readouterr().err)
    assert "its process has ended" in told


def test_a_process_id_that_is_used_again_is_another_process(tmp_path: Path) -> None:
    owner = replace(lock._me(), started="1", token="theirs")
    (tmp_path / lock.NAME).write_text(json.dumps(asdict(owner)))
    _take(tmp_path)


def test_a_silent_run_of_another_machine_is_waited_for_and_taken_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = _left(tmp_path)
    os.utime(path, (2e9, 2e9))  # its clock is decades ahead
    began = time.monotonic()
    _take(tmp_path, timeout_s=0.5)
    assert time.monotonic() - began > 0.5
    assert "process 1 on elsewhere: no heartbeat for" in capsys.readouterr().err


def test_a_heartbeat_of_another_machine_is_seen(tmp_path: Path) -> None:
    path, done = _left(tmp_path), threading.Event()

    def beat() -> None:
        second = 1.0
        while not done.wait(0.05):
            second += 1
            os.utime(path, (second, second))

    owner = threading.Thread(target=beat)
    owner.start()
    try:
        with pytest.raises(lock.InUseError, match="in use by process 1 on elsewhere"):
            lock.acquire(tmp_path, 30, lambda _: None)
    finally:
        done.set()
        owner.join()


@pytest.mark.parametrize(
    "text", ["", "{}", "[1]", '{"host": 1}', pytest.param("[" * 100_000, id="nested"), "1" * 100_000]
)
def test_a_damaged_lock_counts_as_left_behind_once_it_is_silent(tmp_path: Path, text: str) -> None:
    (tmp_path / lock.NAME).write_text(text)
    _take(tmp_path)


@pytest.mark.parametrize("field", ["job", "attempt", "pid"])
def test_a_lock_with_a_value_of_another_type_counts_as_damaged(field: str, tmp_path: Path) -> None:
    path = _left(tmp_path)
    values = json.loads(path.read_text())
    values[field] = 5 if isinstance(values[field], str) else "5"
    path.write_text(json.dumps(values))
    _take(tmp_path)


def test_a_named_pipe_in_the_place_of_a_lock_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / lock.NAME)
    with pytest.raises(LaunchError, match="a named pipe and not a file"):
        lock.acquire(tmp_path, TIMEOUT_S, lambda _: None)


@pytest.mark.parametrize(
    ("variables", "job"),
    [
        ({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}, "Slurm job 7"),
        ({"TORCHELASTIC_RUN_ID": "mine", "TORCHELASTIC_RESTART_COUNT": "1"}, "torchrun mine"),
    ],
)
def test_a_later_start_of_a_job_takes_over_at_once(
    variables: dict[str, str], job: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _left(tmp_path, job=job, attempt=0)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    began = time.monotonic()
    _take(tmp_path, timeout_s=60)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    ("answer", "state"),
    [
        ("echo RUNNING", "lives"), ("echo PENDING", "lives"), ("echo COMPLETED", "gone"), ("true", "gone"),
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", "gone"),
        ("echo 'Unable to contact slurm controller' >&2; exit 1", "unknown"),
    ],
)  # fmt: skip
def test_slurm_is_asked_for_the_job(answer: str, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    squeue = tmp_path / "squeue"
    squeue.write_text(f"#!/bin/sh\n{answer}\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    theirs = replace(lock._me(), kernel="another", job="Slurm job 12")
    assert lock._state(theirs, lock._me())[0] == state


@pytest.mark.parametrize("number", ["1\0", "", "12 --cluster=all", "\u0661"])
def test_slurm_is_not_asked_for_what_is_not_the_number_of_a_job(number: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_job_state", lambda job: pytest.fail(job))
    theirs = replace(lock._me(), kernel="another", job=f"Slurm job {number}")
    assert lock._state(theirs, lock._me())[0] == "unknown"


def test_text_of_a_lock_cannot_control_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _left(tmp_path, job="job\x1b[2J" + "x" * 5_000)
    path.write_text(path.read_text().replace('"elsewhere"', json.dumps("node\x1b]0;title\x07\n")))
    _take(tmp_path)
    told = capsys.readouterr().err
    assert r"process 1 on node\x1b]0;title\x07\n (job\x1b[2Jxxx" in told
    assert all(line.isprintable() and len(line) < 1_000 for line in told.splitlines())


def test_a_job_of_another_cluster_is_not_asked_of_this_ones_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both number their jobs from 1, and share the storage."""
    monkeypatch.setattr(lock, "_job_state", lambda job: ("gone", "its job has ended"))
    theirs = replace(lock._me(), kernel="another", job="Slurm job 12", cluster="alpha")
    me = replace(lock._me(), job="Slurm job 12", cluster="beta", attempt=1)
    assert lock._state(theirs, me)[0] == "unknown"
    assert lock._state(theirs, replace(me, job="Slurm job 13"))[0] == "unknown"
    assert lock._state(theirs, replace(me, job="Slurm job 13", cluster="alpha"))[0] == "gone"
    assert lock._state(theirs, replace(me, job="", cluster=""))[0] == "gone"  # a login node does not name its own


def test_a_lock_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    (tmp_path / lock.NAME).mkdir()
    with pytest.raises(LaunchError, match=r"run\.lock cannot be read: it is a directory"):
        lock.refuse_live(Config(run_dir=str(tmp_path)))


def test_a_run_whose_lock_is_taken_hears_of_it(tmp_path: Path) -> None:
    told: list[str] = []
    taken = lock.acquire(tmp_path, 0.06, told.append)
    time.sleep(0.1)
    assert told == []
    _left(tmp_path)
    programs.wait_for(lambda: bool(told), 10)
    assert told == [f"run_dir={tmp_path} was taken over by process 1 on elsewhere"]
    taken.release()
    assert (tmp_path / lock.NAME).exists()  # which is not its own


def test_a_run_that_gave_its_lock_back_is_not_told_that_it_lost_it(tmp_path: Path) -> None:
    """Its heartbeat ends, so neither the missing file nor the lock of the next run looks like a takeover."""
    told: list[str] = []
    taken = lock.acquire(tmp_path, 0.06, told.append)
    taken.release()
    taken._heartbeat.thread.join(5)
    assert not taken._heartbeat.thread.is_alive()
    assert told == []


def test_a_lock_that_another_run_only_looks_at_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be away at two looks in a row, as often as that happens, and not at three."""
    told: list[str] = []
    taken = lock.acquire(tmp_path, 0.06, told.append)
    own = taken.owner
    coming = [None, None, own, None, None, own]
    monkeypatch.setattr(lock, "_owner", lambda _: coming.pop(0) if coming else own)
    programs.wait_for(lambda: not coming, 10)
    assert told == []
    monkeypatch.setattr(lock, "_owner", lambda _: None)
    programs.wait_for(lambda: bool(told), 10)
    assert told == [f"run_dir={tmp_path} was taken over by a user who removed its lock"]


@pytest.mark.parametrize(("attempt", "state"), [(0, "gone"), (1, "unknown"), (2, "unknown")])
def test_only_an_earlier_start_of_the_job_on_another_machine_has_ended(attempt: int, state: str) -> None:
    me = replace(lock._me(), job="Slurm job 12", attempt=1)
    theirs = replace(me, kernel="another", host="elsewhere", attempt=attempt, token="theirs")
    assert lock._state(theirs, me)[0] == state


def test_the_owner_names_its_machine_as_slurm_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURMD_NODENAME", raising=False)
    assert lock._me().host == socket.gethostname()
    monkeypatch.setenv("SLURMD_NODENAME", "gpu017")
    assert lock._me().host == "gpu017"


def test_two_that_find_the_same_lock_do_not_both_get_it(tmp_path: Path) -> None:
    """The second takes the new lock of the first aside, sees that, and puts it back."""
    stale = lock._owner(_left(tmp_path))
    assert stale is not None
    lock._remove_stale(tmp_path / lock.NAME, stale)
    taken = lock.acquire(tmp_path, TIMEOUT_S, lambda _: None)
    lock._remove_stale(tmp_path / lock.NAME, stale)
    assert lock._owner(tmp_path / lock.NAME) == taken.owner
    taken.release()
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    taken = lock.acquire(tmp_path, TIMEOUT_S, lambda _: None)
    assert not lock._create(tmp_path / lock.NAME, lock._me())
    taken.release()


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LaunchError, match=r"run_dir=.*/file/run cannot be written"):
        lock.acquire(tmp_path / "file" / "run", TIMEOUT_S, lambda _: None)


def test_a_run_is_refused_while_another_one_trains_there(tmp_path: Path) -> None:
    with programs.hanging("hang", tmp_path, 2):
        written = (tmp_path / "config.yaml").read_bytes()
        second = programs.run("report", tmp_path, 2)
        assert second.returncode == 2
        assert second.stderr.startswith(f"error: run_dir={tmp_path} is in use by process ")
        assert second.stderr.count("\n") == 1
        assert (tmp_path / "config.yaml").read_bytes() == written
    third = programs.run("report", tmp_path, 2)  # the first was killed
    assert third.returncode == 0, third.stderr
    assert "was left locked by" in third.stderr
    assert not (tmp_path / lock.NAME).exists()
