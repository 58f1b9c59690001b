"""metrics.jsonl is strict JSON and has each step once."""

from __future__ import annotations

import errno
import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from moe_train.files import untrusted
from moe_train.loop.callbacks.summary import Summary
from moe_train.run import Callback, Run
from moe_train.telemetry.sinks.jsonl import NAME, MetricsFile, read
from tests.loop.fake_run import end, evaluate, fake_run, set_step, start, take_step, with_sinks


def _strict(path: Path) -> list[dict[str, Any]]:
    """Lines as a parser reads them that knows neither NaN nor Infinity."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def _train(run_dir: Path, first: int, last: int, loss: float, interval: int = 1) -> list[dict[str, Any]]:
    """Steps first+1 .. last of 10 with an evaluation before and after them, as moe_train.train does them."""
    run = fake_run(run_dir, step=first, log_interval=interval)
    callbacks = with_sinks(run, MetricsFile)
    start(run, callbacks)
    evaluate(run, callbacks, loss)
    for _ in range(first, last):
        take_step(run, callbacks, loss)
    evaluate(run, callbacks, loss)
    end(run, callbacks)
    return _strict(run_dir / NAME)


def test_lines_have_the_documented_fields(tmp_path: Path) -> None:
    first, line, last = _train(tmp_path, 0, 1, 5.0)
    assert first == {"step": 0, "tokens": 0, "valid_loss": 5.0}
    assert last == {"step": 1, "tokens": 128, "valid_loss": 5.0}
    assert list(line) == [
        "step", "tokens", "lm_loss", "grad_norm", "lr", "global_batch_size", "mtp_loss", "seq_load_balancing_loss",
        "step_time_s", "tokens_per_s", "tflops_per_rank", "mfu", "memory_peak_bytes", "expert_load",
    ]  # fmt: skip
    assert line["global_batch_size"] == 8
    assert line["expert_load"] == [[96, 32], [64, 64], [100, 28]]  # the dense layer has no row


def test_a_resumed_run_replaces_the_steps_it_repeats(tmp_path: Path) -> None:
    _train(tmp_path, 0, 6, 5.0)
    with (tmp_path / NAME).open("a") as file:
        file.write('{"step": 7, "lm_lo')  # the run died while it wrote
    lines = _train(tmp_path, 4, 8, 4.0)
    assert [(line["step"], line["lm_loss"]) for line in lines if "lm_loss" in line] == [
        (1, 5.0), (2, 5.0), (3, 5.0), (4, 5.0), (5, 4.0), (6, 4.0), (7, 4.0), (8, 4.0),
    ]  # fmt: skip
    assert [line["step"] for line in lines if "valid_loss" in line] == [0, 4, 8]
    assert sorted(path.name for path in tmp_path.iterdir()) == [NAME]


def test_what_a_run_that_was_killed_while_it_rewrote_its_lines_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / f".{NAME}.0123456789abcdef.part").write_text("half")  # as large as the file itself
    _train(tmp_path, 0, 1, 5.0)
    assert os.listdir(tmp_path) == [NAME]


def test_an_evaluation_is_not_repeated_where_the_run_continues(tmp_path: Path) -> None:
    _train(tmp_path, 0, 4, 5.0)
    lines = _train(tmp_path, 4, 5, 4.0)
    assert [(line["step"], line["valid_loss"]) for line in lines if "valid_loss" in line] == [
        (0, 5.0),
        (4, 5.0),
        (5, 4.0),
    ]


def test_a_fresh_run_starts_a_new_file(tmp_path: Path) -> None:
    _train(tmp_path, 0, 5, 5.0)
    assert [line["step"] for line in _train(tmp_path, 0, 2, 4.0)] == [0, 1, 2, 2]


def test_values_that_json_cannot_hold_are_null_and_named(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    callbacks = with_sinks(run, MetricsFile)
    start(run, callbacks)
    take_step(run, callbacks, float("nan"), grad_norm=float("inf"))
    evaluate(run, callbacks, float("-inf"))
    end(run, callbacks)
    train, valid = _strict(tmp_path / NAME)
    assert train["lm_loss"] is None
    assert train["grad_norm"] is None
    assert train["lr"] == 1e-3
    assert train["non_finite"] == {"lm_loss": "nan", "grad_norm": "inf"}
    assert valid == {"step": 1, "tokens": 128, "valid_loss": None, "non_finite": {"valid_loss": "-inf"}}
    assert list(read(tmp_path / NAME)) == [train, valid]


def test_each_line_is_on_disk_when_its_step_ends(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    callbacks = with_sinks(run, MetricsFile)
    start(run, callbacks)
    take_step(run, callbacks)
    assert [line["step"] for line in _strict(tmp_path / NAME)] == [1]
    end(run, callbacks)


def test_damaged_lines_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a crash leaves them, or a copy that went wrong."""
    monkeypatch.setattr(untrusted, "_LARGEST_LINE_BYTES", 150_000)
    longest = '{"step": 3, "a": "' + "x" * 150_000 + '{"step": 4}'
    damaged = ['{"step": 2, "lm', "[" * 100_000, "[1]", '{"step": "5"}', "\udcff", longest, '{"step": 6, "a": 0}']
    text = "\n".join(['{"step": 1}', *damaged, '{"step": 7}'])
    (tmp_path / NAME).write_text(text, errors="surrogateescape")
    assert [line["step"] for line in read(tmp_path / NAME)] == [1, 6, 7]


def test_only_every_nth_step_and_the_first_and_last_are_logged(tmp_path: Path) -> None:
    lines = _train(tmp_path, 0, 10, 5.0, interval=4)
    assert [line["step"] for line in lines if "lm_loss" in line] == [1, 4, 8, 10]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    run = fake_run(tmp_path, rank=1)
    callbacks = with_sinks(run)
    start(run, callbacks)
    take_step(run, callbacks)
    evaluate(run, callbacks, 5.0)
    end(run, callbacks)
    assert list(tmp_path.iterdir()) == []


def test_memory_does_not_follow_the_length_of_the_file(tmp_path: Path) -> None:
    """Neither where a run continues nor where its end is told."""
    load = [[128] * 1000] * 4
    (tmp_path / "short").mkdir()
    for directory, steps in ((tmp_path, 200), (tmp_path / "short", 4)):
        with (directory / NAME).open("w") as file:
            for step in range(1, steps + 1):
                file.write(json.dumps({"step": step, "lm_loss": 9.0 - step / 1000, "expert_load": load}) + "\n")
    size = (tmp_path / NAME).stat().st_size

    def start_and_end(run: Run, callbacks: list[Callback]) -> None:
        run.completed = True
        start(run, callbacks)
        end(run, callbacks)

    start_and_end(fake_run(tmp_path / "short", step=3), [Summary()])  # imports matplotlib
    run = fake_run(tmp_path, step=199)
    for callbacks in (with_sinks(run, MetricsFile), [Summary()]):
        tracemalloc.start()
        start_and_end(run, callbacks)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < size / 2, callbacks
    with (tmp_path / NAME).open() as file:
        assert [json.loads(line)["step"] for line in file] == list(range(1, 200))
    losses = json.loads((tmp_path / "summary.json").read_text())["train_loss"]
    assert (losses["first"], losses["last"]) == (9.0 - 0.001, 9.0 - 0.199)


def test_lines_of_steps_to_repeat_stay_where_the_file_cannot_be_rewritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    run = fake_run(tmp_path)
    callbacks = with_sinks(run, MetricsFile)
    start(run, callbacks)
    for _ in range(3):
        take_step(run, callbacks)
    set_step(run, 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        callbacks[0].on_rollback(run)
    take_step(run, callbacks)
    end(run, callbacks)
    assert os.listdir(tmp_path) == [NAME]
    assert "metrics.jsonl keeps its lines after step 1" in capsys.readouterr().err
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 2]
