"""The progress line: control codes on a terminal only, and no more plain lines than someone would read."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from moe_train.loop.callbacks import progress
from moe_train.loop.callbacks.progress import Progress
from tests.loop.fake_run import evaluate, fake_run, take_step


def _train(run_dir: Path, seconds: float, clock: list[float], rank: int = 0, steps: int = 10) -> None:
    run, callback = fake_run(run_dir, rank=rank), Progress()
    callback.on_start(run)
    evaluate(run, [callback], 8.25)
    for _ in range(steps):
        clock[0] += seconds
        take_step(run, [callback], 5.5)
    callback.on_end(run)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_log_file_gets_plain_lines(tmp_path: Path, clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    _train(tmp_path, 60.0, clock)
    output = capsys.readouterr().out
    assert "\x1b" not in output
    assert "\r" not in output
    lines = output.splitlines()
    assert len(lines) == 11  # one evaluation, and each slow step
    assert lines[0] == "step 0/10 | validation loss 8.2500"
    assert lines[4] == "step 4/10 | loss 5.5000 | valid 8.2500 | 256 tokens/s | MFU 25.0% | ETA 0:06:00"


def test_fast_steps_do_not_flood_a_log_file(
    tmp_path: Path, clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    _train(tmp_path, 1.25, clock)
    steps = [line.split()[1] for line in capsys.readouterr().out.splitlines() if "loss 5.5" in line]
    assert steps == ["1/10", "5/10", "9/10", "10/10"]


def test_an_unknown_peak_shows_no_utilisation(
    tmp_path: Path, clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    run, callback = fake_run(tmp_path), Progress()
    callback.on_start(run)
    take_step(run, [callback], mfu=None)
    assert "MFU" not in capsys.readouterr().out


def test_other_ranks_print_nothing(tmp_path: Path, clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    _train(tmp_path, 60.0, clock, rank=1)
    assert capsys.readouterr().out == ""


def test_a_terminal_gets_a_live_line(
    tmp_path: Path, clock: list[float], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "150")
    monkeypatch.delenv("NO_COLOR", raising=False)
    _train(tmp_path, 60.0, clock, steps=4)
    output = capsys.readouterr().out
    assert "step 4/10  loss 5.5000  valid 8.2500  256 tokens/s  MFU 25.0%  ETA 0:06:00" in output
    assert output.rstrip().endswith("\x1b[2K") or "\x1b[?25h" in output  # the line is gone and the cursor is back
