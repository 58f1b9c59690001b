"""Nothing that only tells of a run ends it: metrics, events, log and summary on a disk that is full."""

from __future__ import annotations

import errno
import json
import logging
import os
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moe_train.loop.callbacks import summary as summary_module
from moe_train.loop.callbacks.metrics_file import MetricsFile
from moe_train.loop.callbacks.run_log import RunLog
from moe_train.loop.callbacks.summary import Summary
from moe_train.loop.callbacks.tensorboard import TensorBoard
from moe_train.run import Callback
from tests.loop.fake_run import evaluate, fake_run, take_step


def test_a_run_goes_on_while_its_directory_is_full_and_tells_the_rest_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, write = fake_run(tmp_path), os.write
    callbacks: list[Callback] = [MetricsFile(), TensorBoard(), Summary(), RunLog(run)]

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    run.callbacks = callbacks
    for callback in callbacks:
        callback.on_start(run)
    take_step(run, callbacks)
    monkeypatch.setattr(os, "write", full)
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
    for callback in callbacks:
        callback.on_end(run)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "lm_loss" in line] == [1, 2, 3, 4, 5]
    assert [line["valid_loss"] for line in lines if "valid_loss" in line] == [4.0]
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("lm_loss")] == [1, 2, 3, 4, 5]
    assert [line["event"] for line in lines if "event" in line] == ["skipped"]
    assert "a record" in (tmp_path / "run.log").read_text()
    errors = capsys.readouterr().err
    assert errors.count("can be written again") == 3
    assert "Traceback" not in errors


def test_a_summary_that_cannot_be_written_is_shown_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(summary_module, "replace_file", full)
    run, callbacks = fake_run(tmp_path), [Summary()]
    for callback in callbacks:
        callback.on_start(run)
    take_step(run, callbacks)
    run.completed = True
    callbacks[0].on_end(run)
    told = capsys.readouterr()
    assert told.out.startswith("Done: ")
    assert "summary.json cannot be written: No space left on device; the same command writes it" in told.err


def test_lines_of_steps_to_repeat_stay_where_the_file_cannot_be_rewritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, callback = fake_run(tmp_path), MetricsFile()
    callback.on_start(run)
    for _ in range(3):
        take_step(run, [callback])
    run.state.step = 1
    (tmp_path / "metrics.jsonl.part").mkdir()  # a file cannot be made of that name
    callback.on_rollback(run)
    take_step(run, [callback])
    callback.on_end(run)
    assert "metrics.jsonl keeps its lines after step 1" in capsys.readouterr().err
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 2]
