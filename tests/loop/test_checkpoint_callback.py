from pathlib import Path

import pytest

from moe_train.checkpoint import checkpoint
from moe_train.loop.callbacks.checkpoint import CheckpointCallback
from moe_train.loop.run import Run
from tests.loop.fake_run import fake_run, take_step


@pytest.mark.parametrize(
    ("interval", "at_end", "total", "expected"),
    [
        (0, True, 6, [6]),
        (0, False, 6, []),
        (2, True, 6, [2, 4, 6]),  # the last step once
        (4, True, 6, [4, 6]),
        (4, False, 6, [4]),
    ],
)
def test_saves_at_the_interval_and_after_the_last_step_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interval: int, at_end: bool, total: int, expected: list[int]
) -> None:
    saved: list[int] = []

    def save(run: Run) -> Path:
        saved.append(run.state.step)
        return tmp_path

    monkeypatch.setattr(checkpoint, "save", save)
    run = fake_run(tmp_path, total_steps=total)
    run.cfg.checkpoint.interval_steps, run.cfg.checkpoint.save_at_end = interval, at_end
    callback = CheckpointCallback()
    callback.on_start(run)
    for _ in range(total):
        take_step(run, [callback])
    callback.on_end(run)
    assert saved == expected


def test_one_rank_prints_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_bytes(bytes(2_000_000))
    monkeypatch.setattr(checkpoint, "save", lambda run: tmp_path)
    for rank in (0, 1):
        take_step(fake_run(tmp_path, total_steps=1, rank=rank), [CheckpointCallback()])
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"checkpoint of step 1 in {tmp_path} (2 MB, ")


def test_nothing_is_saved_after_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "save", lambda run: pytest.fail("saved"))
    run = fake_run(tmp_path, step=3, total_steps=6)
    CheckpointCallback().on_end(run)
