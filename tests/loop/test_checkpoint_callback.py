from pathlib import Path

import pytest

from moe_train.checkpoint import checkpoint
from moe_train.loop.callbacks.checkpoint import CheckpointCallback
from moe_train.run import Run
from parallel.errors import CheckpointError
from tests.loop.fake_run import fake_run, take_step
from tests.loop.fake_saving import FakeSaving


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[FakeSaving]:
    """The checkpoints that were begun. They take two steps; those of the steps in `failing` fail."""
    found: list[FakeSaving] = []

    def begin(run: Run, *, copy: bool) -> FakeSaving:
        found.append(FakeSaving(run, copy, 2, run.state.step in failing))
        return found[-1]

    failing.clear()
    monkeypatch.setattr(checkpoint, "begin", begin)
    return found


failing: set[int] = set()


def train(run: Run, steps: int, **settings: object) -> CheckpointCallback:
    """Take steps with a callback and these settings of the group `checkpoint`."""
    for name, value in settings.items():
        setattr(run.cfg.checkpoint, name, value)
    callback = CheckpointCallback()
    callback.on_start(run)
    for _ in range(steps):
        take_step(run, [callback])
    return callback


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize(
    ("interval", "at_end", "total", "expected"),
    [
        (0, True, 6, [6]),
        (0, False, 6, []),
        (2, True, 6, [2, 4, 6]),  # the last step once
        (4, True, 6, [4, 6]),
        (4, False, 6, [4]),
        (1, True, 3, [1, 2, 3]),  # the next is due while one is on its way
        (3, False, 6, [3, 6]),
    ],
)
def test_saves_at_the_interval_and_after_the_last_step_once(
    tmp_path: Path, begun: list[FakeSaving], capsys: pytest.CaptureFixture[str],
    asynchronous: bool, interval: int, at_end: bool, total: int, expected: list[int],
) -> None:  # fmt: skip
    run = fake_run(tmp_path, total_steps=total)
    callback = train(run, total, asynchronous=asynchronous, interval_steps=interval, save_at_end=at_end)
    callback.on_end(run)
    assert [saving.job.step for saving in begun] == expected
    assert not any(saving.abandoned for saving in begun)
    assert len(capsys.readouterr().out.splitlines()) == len(expected)  # all were completed
    for saving in begun:
        last = saving.job.step == total and at_end
        assert saving.copy == (asynchronous and not last)  # nothing changes the state while the run waits
        assert saving.waited or asynchronous


def test_one_rank_prints_one_line(tmp_path: Path, begun: list[FakeSaving], capsys: pytest.CaptureFixture[str]) -> None:
    for rank in (0, 1):
        train(fake_run(tmp_path, total_steps=1, rank=rank), 1)
    (line,) = capsys.readouterr().out.splitlines()
    assert line == f"checkpoint of step 1 in {tmp_path} (2 MB, 0.5 s)"


def test_training_goes_on_while_one_is_written(
    tmp_path: Path, begun: list[FakeSaving], capsys: pytest.CaptureFixture[str]
) -> None:
    run = fake_run(tmp_path, total_steps=10)
    callback = train(run, 3, asynchronous=True, interval_steps=2)
    assert capsys.readouterr().out == ""
    take_step(run, [callback])
    (line,) = capsys.readouterr().out.splitlines()
    assert line == f"checkpoint of step 2 in {tmp_path} (2 MB, 0.5 s, training waited 0.0 s)"
    assert not begun[0].waited


def test_a_wish_to_save_waits_for_the_one_on_its_way(tmp_path: Path, begun: list[FakeSaving]) -> None:
    run = fake_run(tmp_path, total_steps=10)
    callback = train(run, 2, asynchronous=True, interval_steps=2)
    callback.save(run)  # of the same step
    assert [saving.job.step for saving in begun] == [2]
    assert begun[0].waited
    callback = train(run, 3, asynchronous=True, interval_steps=4)
    callback.save(run)  # of a later one
    assert [saving.job.step for saving in begun[1:]] == [4, 5]
    assert all(saving.waited for saving in begun[1:])


@pytest.mark.parametrize("asynchronous", [False, True])
def test_failures_in_a_row_are_borne_up_to_a_number(
    tmp_path: Path, begun: list[FakeSaving], capsys: pytest.CaptureFixture[str], asynchronous: bool
) -> None:
    failing.update((1, 2, 4, 5, 6))
    run = fake_run(tmp_path, total_steps=20)
    with pytest.raises(CheckpointError, match="cannot write"):
        train(run, 10, asynchronous=asynchronous, interval_steps=1, max_consecutive_failures=3)
    assert run.state.step == (7 if asynchronous else 6)
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 1  # of step 3
    assert captured.err.splitlines() == [
        f"warning: cannot write; free space (not saved; {count} in a row, and checkpoint.max_consecutive_failures=3)"
        for count in (1, 2, 1, 2)
    ]


def test_the_last_checkpoint_must_be_written(tmp_path: Path, begun: list[FakeSaving]) -> None:
    failing.update((5, 6))
    with pytest.raises(CheckpointError, match="cannot write"):
        train(fake_run(tmp_path, total_steps=6), 6, asynchronous=True, interval_steps=5, max_consecutive_failures=3)
    assert [saving.job.step for saving in begun] == [5, 6]  # that an earlier one failed is no reason not to try


def test_after_an_error_nothing_is_saved_and_what_is_on_its_way_is_given_up(
    tmp_path: Path, begun: list[FakeSaving], capsys: pytest.CaptureFixture[str]
) -> None:
    run = fake_run(tmp_path, step=3, total_steps=6)
    CheckpointCallback().on_end(run)
    assert begun == []
    callback = train(run, 1, asynchronous=True, interval_steps=4)
    callback.on_end(run)
    assert begun[0].abandoned
    assert capsys.readouterr().err == "warning: the checkpoint of step 4 was not completed\n"


def test_a_bad_step_is_saved_only_where_it_is_the_last(tmp_path: Path, begun: list[FakeSaving]) -> None:
    """Those from before it are what a run can go back to, and only so many are kept."""
    run = fake_run(tmp_path, total_steps=4)
    run.cfg.checkpoint.interval_steps = 1
    callback = CheckpointCallback()
    callback.on_start(run)
    for step, metrics in enumerate([{}, {"bad_step": "lm_loss is nan"}, {}, {"bad_step": "lm_loss is nan"}], 1):
        run.state.step = step
        callback.on_step_end(run, dict(metrics))
    assert [saving.job.step for saving in begun] == [1, 3, 4]
    assert callback.own_steps == {0, 1, 3, 4}


def test_what_was_saved_after_going_back_is_not_saved_again(tmp_path: Path, begun: list[FakeSaving]) -> None:
    run = fake_run(tmp_path, total_steps=10)
    callback = train(run, 5, interval_steps=2)
    run.state.step = 4
    callback.on_rollback(run)
    callback.on_step_end(run, {})
    assert [saving.job.step for saving in begun] == [2, 4, 4]
    assert callback.own_steps == {0, 2, 4}
