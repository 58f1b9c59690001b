"""A command of `tests.forked` is given what a new process is, and ends as that does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests import forked

ROOT = Path(__file__).parents[1]
PROBE = [sys.executable, "-m", "tests.forked_probe"]


def both(end: str, **options: Any) -> list[tuple[int, list[str], str]]:
    """Exit code, lines of the output and last line of the errors: of a new process, and of a fork."""
    found = []
    for start in (subprocess.Popen, forked.Popen):
        process = start(
            [*PROBE, end, "a word"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            **options,
        )  # fmt: skip
        assert isinstance(process, forked.Popen) == (process._report is not None if start is forked.Popen else False)
        output, errors = process.communicate("said", timeout=60)
        found.append((process.returncode, output.splitlines(), (errors.splitlines() or [""])[-1]))
    return found


@pytest.mark.parametrize("end", ["0", "7", "300", "text", "raises", "by signal", "interrupted", "with a thread"])
def test_it_ends_as_a_new_process_does(end: str) -> None:
    new, fork = both(end, cwd=ROOT)
    assert fork[0] == new[0]
    assert fork[1][1:] == new[1][1:]
    assert fork[2] == new[2]
    assert (new[1][-1] == "at exit") == (end != "by signal")


def test_it_is_given_what_a_new_process_is(tmp_path: Path) -> None:
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    environment |= {name: value for name, value in os.environ.items() if name.startswith(forked.OF_INTERPRETER)}
    environment |= {"PYTHONPATH": str(ROOT), "MADE_UP": "ä"}
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    mask = os.umask(0o27)
    try:
        new, fork = (json.loads(lines[0]) for _, lines, _ in both("0", cwd=tmp_path, env=environment,
                                                                  start_new_session=True))  # fmt: skip
    finally:
        signal.signal(signal.SIGHUP, before)
        os.umask(mask)
    (_standby,) = set(fork.pop("files")) - set(new.pop("files"))  # leads to what becomes the fork server
    assert fork == new
    assert new["input"] == "said"
    assert new["environment"]["MADE_UP"] == "ä"
    assert (new["umask"], new["leads its group"]) == (0o27, True)


def test_a_program_of_another_kind_is_a_new_process() -> None:
    assert forked.run(["sh", "-c", "exit 3"], timeout=30).returncode == 3
    with forked.Popen([*PROBE, "0"], cwd=ROOT, env=os.environ | {"PYTHONUTF8": "1"}, stdout=subprocess.PIPE) as process:
        assert process._report is None
        process.communicate("", timeout=60)


def test_a_command_that_takes_too_long_is_killed(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(subprocess.TimeoutExpired):
        forked.run([*PROBE, "sleeps"], cwd=ROOT, timeout=0.5, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    assert time.monotonic() - began < 30


def test_nothing_of_a_killed_command_is_left() -> None:
    """Nor what waits to become its fork server."""
    with forked.Popen([*PROBE, "0"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        below = psutil.Process(process.pid).children(recursive=True)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    _, left = psutil.wait_procs(below, timeout=10)
    assert [child for child in left if child.status() != psutil.STATUS_ZOMBIE] == []
