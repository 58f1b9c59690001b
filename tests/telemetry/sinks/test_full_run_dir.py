"""Faults of a run directory that is full, read-only or missing: the run goes on, and the rest is written later."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moe_train.loop.callbacks.summary import Summary
from tests.loop.fake_run import end, evaluate, fake_run, start, take_step, with_sinks


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_run_goes_on_while_its_directory_is_full_and_writes_the_rest_later(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    run, write = fake_run(tmp_path), os.write
    sinks, close = with_sinks(run)
    callbacks = [sinks, Summary(), close]
    start(run, callbacks)
    take_step(run, callbacks)
    monkeypatch.setattr(os, "write", fail)
    for _ in range(3):
        take_step(run, callbacks)
    logging.getLogger("moe_train").warning("a record")
    run.announce("skipped", reason="a drill")
    evaluate(run, callbacks, 4.0)
    warnings = [line for line in capsys.readouterr().err.splitlines() if "cannot be written" in line]
    assert len(warnings) == 3  # metrics, events and log, each once
    monkeypatch.setattr(os, "write", write)
    take_step(run, callbacks)
    run.completed = True
    end(run, callbacks)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "lm_loss" in line] == [1, 2, 3, 4, 5]
    assert [line["valid_loss"] for line in lines if "valid_loss" in line] == [4.0]
    assert [line["event"] for line in lines if line.get("reason") == "a drill"] == ["skipped"]
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("lm_loss")] == [1, 2, 3, 4, 5]
    log = (tmp_path / "run.log").read_text()
    assert "a record" in log
    errors = capsys.readouterr().err
    assert errors.count("can be written again") == 3
    assert "Traceback" not in errors
    # Each sink has the failures of the others.
    reports = [(line["event"], line["sink"]) for line in lines if line.get("event", "").startswith("sink_")]
    assert sorted(reports) == [
        ("sink_failed", "TensorBoard"), ("sink_failed", "run.log"),
        ("sink_recovered", "TensorBoard"), ("sink_recovered", "run.log"),
    ]  # fmt: skip
    assert f"step 2: sink_failed reason={os.strerror(number)} sink=metrics.jsonl" in log
    assert "sink_recovered sink=metrics.jsonl" in log


_ON_A_SMALL_DISK = """
import sys
from pathlib import Path
from tests.loop.fake_run import end, fake_run, start, take_step, with_sinks
run = fake_run(Path(sys.argv[1]) / "run", total_steps=400)
callbacks = with_sinks(run)
start(run, callbacks)
for _ in range(300):
    take_step(run, callbacks)
(Path(sys.argv[1]) / "ballast").unlink()
take_step(run, callbacks)
run.completed = True
end(run, callbacks)
"""


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="a file system of its own needs root")
def test_a_disk_that_fills_up_and_has_space_again_loses_nothing(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    script = (
        f"mount -t tmpfs -o size=1m small {disk} || exit 99; head -c 960k /dev/zero > {disk}/ballast; "
        f'"$@" && cp -r {disk}/run {tmp_path}/'
    )
    command = ["unshare", "--mount", "sh", "-c", script, "sh", sys.executable, "-c", _ON_A_SMALL_DISK, str(disk)]
    root = Path(__file__).parents[3]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    if done.returncode in (1, 99) and "Operation not permitted" in done.stderr:
        pytest.skip("no file system can be mounted here")
    assert done.returncode == 0, done.stderr
    assert "metrics.jsonl cannot be written: No space left on device" in done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "lm_loss" in line] == list(range(1, 302))
    events = EventAccumulator(str(tmp_path / "run"), size_guidance={"scalars": 0}).Reload()
    assert [event.step for event in events.Scalars("lm_loss")] == list(range(1, 302))


def test_a_run_directory_that_cannot_be_made_is_made_later(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "there").write_text("a file, so that there can be no directory of that name")
    run = fake_run(tmp_path / "there" / "run")
    callbacks = with_sinks(run)
    start(run, callbacks)
    take_step(run, callbacks)
    assert "metrics.jsonl failed: NotADirectoryError" in capsys.readouterr().err
    (tmp_path / "there").unlink()
    take_step(run, callbacks)
    end(run, callbacks)
    lines = [json.loads(line) for line in (tmp_path / "there" / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "lm_loss" in line] == [1, 2]
    assert "step 0 to 10" in (tmp_path / "there" / "run" / "run.log").read_text()
