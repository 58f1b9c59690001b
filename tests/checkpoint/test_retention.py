import os
import shutil
from pathlib import Path

import pytest

from moe_train.checkpoint import retention
from moe_train.formats import run_directory
from tests.formats.test_run_directory import make


def names(root: Path) -> list[int]:
    """Steps of the checkpoints under `root`."""
    return sorted(run_directory.step_of(path.name) for path in run_directory.candidates(root))


def save_all(root: Path, steps: list[int], keep_last: int | None, keep_every: int | None) -> list[int]:
    """Steps that are left of a run that saved at `steps`."""
    for step in steps:
        make(root, run_directory.name_of(step))
        retention.apply(root, keep_last, keep_every)
    return names(root)


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "left"),
    [
        (None, None, [10, 20, 30, 40, 50, 60]),
        (1, None, [60]),
        (2, None, [50, 60]),
        (9, None, [10, 20, 30, 40, 50, 60]),
        (1, 20, [20, 40, 60]),
        (2, 30, [30, 50, 60]),
    ],
)
def test_the_newest_and_the_multiples_stay(
    tmp_path: Path, keep_last: int | None, keep_every: int | None, left: list[int]
) -> None:
    assert save_all(tmp_path, [10, 20, 30, 40, 50, 60], keep_last, keep_every) == left
    assert sorted(os.listdir(tmp_path)) == ["latest", *(run_directory.name_of(step) for step in left)]


def test_what_latest_names_and_later_steps_stay(tmp_path: Path) -> None:
    save_all(tmp_path, [10, 20, 30, 40], None, None)
    run_directory.write_latest(tmp_path, run_directory.name_of(20))  # the run was set back to an earlier step
    retention.apply(tmp_path, 1, None)
    assert names(tmp_path) == [20, 30, 40]


def test_what_is_no_checkpoint_of_the_run_stays(tmp_path: Path) -> None:
    save_all(tmp_path, [30], None, None)
    elsewhere = make(tmp_path / "elsewhere", run_directory.name_of(20))
    (tmp_path / "step_00000020").symlink_to(elsewhere)
    foreign = [tmp_path / name for name in ("step_00000010", "step_00000005-best", "notes")]
    for path in foreign:
        path.mkdir()
        (path / "file").write_text("mine")
    retention.apply(tmp_path, 1, None)
    assert all((path / "file").read_text() == "mine" for path in foreign)
    assert (tmp_path / "step_00000020" / run_directory.STATE).is_file()


def test_killed_while_removing_leaves_whole_checkpoints_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_all(tmp_path, [10, 20, 30], None, None)

    def killed(path: Path) -> None:
        os.unlink(path / run_directory.STATE)
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        retention.apply(tmp_path, 1, None)
    monkeypatch.undo()
    assert names(tmp_path) == [10, 30]  # 20 was being removed, and 10 would have been next
    for path in run_directory.candidates(tmp_path):
        run_directory.check_files(path)
    run_directory.recover(tmp_path)  # must not bring it back
    assert save_all(tmp_path, [40], 1, None) == [40]
    assert sorted(os.listdir(tmp_path)) == ["latest", "step_00000040"]
