"""What locks share: reading an owner that anyone may have written, heartbeats, and silence."""

from __future__ import annotations

import json
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from moe_train.files import locks
from tests.launch import programs


@dataclass
class Owner:
    host: str
    pid: int


def test_names_are_shown_without_terminal_controls_and_at_a_bounded_length() -> None:
    """An escape sequence could clear the screen, retitle the window or hide what follows."""
    assert locks.name_of(5, "n1\x1b]0;title\x07\r\n\x9b2J\u202e") == r"process 5 on n1\x1b]0;title\x07\r\n\x9b2J\u202e"
    assert locks.name_of(5, "Zürich") == "process 5 on Zürich"
    assert len(locks.printable("\x1b" * 60_000)) == 203


@pytest.mark.parametrize("pid", [-1, 2**31, 2**63, "5", True, None, 5.0])
def test_an_owner_without_a_process_id_is_damage(pid: object, tmp_path: Path) -> None:
    (tmp_path / "lock").write_text(json.dumps({"host": "a", "pid": pid}))
    assert locks.read_owner(tmp_path / "lock", Owner) is None


def test_an_owner_is_read(tmp_path: Path) -> None:
    assert locks.read_owner(tmp_path / "lock", Owner) is None
    (tmp_path / "lock").write_text('{"host": "a", "pid": 2147483647}')
    assert locks.read_owner(tmp_path / "lock", Owner) == Owner("a", 2**31 - 1)
    (tmp_path / "lock").write_text('{"host": "' + "a" * 2**16 + '", "pid": 1}')
    assert locks.read_owner(tmp_path / "lock", Owner) is None


def test_a_watch_sees_heartbeats_of_a_machine_with_another_clock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    watch = locks.LockWatch(path)
    with pytest.raises(FileNotFoundError):
        watch.look()
    path.touch()
    assert watch.is_new
    assert [watch.look(), watch.look()] == [False, False]
    assert not watch.is_new
    for second in (4e9, 1.0):
        time.sleep(0.02)
        assert watch.silent_s >= 0.02
        began = time.monotonic()
        os.utime(path, (second, second))
        assert watch.look()
        assert watch.silent_s <= time.monotonic() - began
    assert watch.watched_s >= 0.04


def test_a_heartbeat_ends_where_its_lock_is_removed(tmp_path: Path) -> None:
    path, lost = tmp_path / "lock", threading.Event()
    path.touch()
    heartbeat = locks.LockHeartbeat(path, 0.01, 0.01, lost=lost.set)
    try:
        watch = locks.LockWatch(path)
        watch.look()
        programs.wait_for(watch.look, 10)
        assert not lost.is_set()
        path.unlink()
        assert lost.wait(10)
        heartbeat.thread.join(10)
        assert not heartbeat.thread.is_alive()
    finally:
        heartbeat.end()
