"""What a run will write, and what a directory is able to take."""

from __future__ import annotations

import errno
import os
import subprocess
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch.preflight import disks
from moe_train.config.composition.compose import compose
from moe_train.config.composition.validate import validate
from moe_train.config.schema import Config
from moe_train.formats import run_directory
from moe_train.model.memory import checkpoint_bytes, workload_of
from tests.launch.preflight.test_preflight import preflight

MIB = disks.MIB


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a file system needs root")
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", place], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


def _place(path: Path) -> disks.StoragePlace:
    return disks.StoragePlace("run_dir", path, True, 0, 0)


def test_a_directory_is_written_and_read_and_left_as_it_was(tmp_path: Path) -> None:
    place = _place(tmp_path / "run")
    disk = disks.look(place, "rank_0", 4)
    assert disk.problem == ""
    assert disk.write_mb_s is not None
    assert disk.read_mb_s is not None
    assert 0 < disk.write_mb_s < 1e6
    assert disk.free_bytes > 0
    assert (tmp_path / "run/.preflight/rank_0").stat().st_size == 4 * MIB
    disks.remove(place, "rank_0")
    assert list((tmp_path / "run").iterdir()) == []


def test_a_probe_leaves_most_of_a_small_disk_to_others(small: Path) -> None:
    assert disks.look(_place(small), "rank_0", 256).problem == ""
    assert (small / ".preflight/rank_0").stat().st_size == 2 * MIB


def test_a_full_disk_is_told(small: Path) -> None:
    (small / "filler").write_bytes(bytes(16 * MIB - 8192))
    disk = disks.look(_place(small), "rank_0", 4)
    assert (disk.problem, disk.write_mb_s) == ("No space left on device", None)


def test_a_place_that_is_no_directory_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert disks.look(_place(tmp_path / "file"), "rank_0", 1).problem in ("Not a directory", "File exists")


class Clock:
    """In place of the module `time`: each look takes `seconds`."""

    def __init__(self, seconds: float) -> None:
        self.now, self.seconds = 0.0, seconds

    def perf_counter(self) -> float:
        self.now += self.seconds
        return self.now


def test_speeds_count_until_the_data_are_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: two blocks with four looks at the clock after the first, and 6 seconds of fsync."""
    clock = Clock(0.5)
    monkeypatch.setattr(disks, "time", clock)
    monkeypatch.setattr(os, "fsync", lambda file: setattr(clock, "now", clock.now + 6))
    disk = disks.look(_place(tmp_path), "rank_0", 2)
    assert disk.write_mb_s == pytest.approx(2 * MIB / 1e6 / (3 * 0.5 + 6))
    assert disk.read_mb_s == pytest.approx(2 * MIB / 1e6 / (3 * 0.5))


def test_a_slow_disk_does_not_hold_the_check_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It writes for 5 seconds, reads what it has written by then, and closes what it opened."""
    clock = Clock(1.1)
    monkeypatch.setattr(disks, "time", clock)
    monkeypatch.setattr(os, "fsync", lambda file: setattr(clock, "seconds", 0.01))
    opened = len(os.listdir("/proc/self/fd"))
    disk = disks.look(_place(tmp_path), "rank_0", 64)
    assert disk.problem == ""
    assert (tmp_path / ".preflight/rank_0").stat().st_size == 4 * MIB
    assert len(os.listdir("/proc/self/fd")) == opened


def test_what_is_written_is_not_made_smaller_by_the_file_system(tmp_path: Path) -> None:
    disks.look(_place(tmp_path), "rank_0", 1)
    content = (tmp_path / ".preflight/rank_0").read_bytes()
    assert len(zlib.compress(content, 1)) > 0.99 * MIB


def _usage(**changes: int) -> SimpleNamespace:
    """What a file system of 4,096-byte blocks says of itself, where only root may use all that is free."""
    usual = {"f_frsize": 4096, "f_bavail": 2560, "f_bfree": 10**6, "f_files": 1000, "f_favail": 500}
    return SimpleNamespace(**usual | changes)


def test_what_only_root_may_use_is_not_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "statvfs", lambda path: _usage())
    disk = disks.look(_place(tmp_path), "rank_0", 64)
    assert (disk.problem, disk.free_bytes) == ("", 10 * MIB)
    assert (tmp_path / ".preflight/rank_0").stat().st_size == MIB  # an eighth of 10, at least one


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"f_favail": 99}, "No space left on device (99 files can be made)"),
        ({"f_favail": 100}, ""),
        ({"f_files": 0, "f_favail": 0}, ""),  # as btrfs answers, which has no limit
    ],
)
def test_a_file_system_without_room_for_files_is_full(
    changes: dict[str, int], problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "statvfs", lambda path: _usage(**changes))
    disk = disks.look(_place(tmp_path / "run"), "rank_0", 1)
    assert (disk.problem, disk.free_bytes) == (problem, 10 * MIB)
    disks.remove(_place(tmp_path / "run"), "rank_0")
    assert list((tmp_path / "run").iterdir()) == [], "also where no file was written"


def test_a_file_that_is_cut_short_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a disk that fills up, and by one that loses what was written."""
    write, read = os.write, os.readv
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda file, block: write(file, block) - 4096)
        assert disks.look(_place(tmp_path), "rank_0", 1).problem == "No space left on device"
    with monkeypatch.context() as patch:
        patch.setattr(os, "readv", lambda file, blocks: read(file, blocks) - 1)
        disk = disks.look(_place(tmp_path), "rank_0", 1)
    assert (disk.problem, disk.read_mb_s) == ("a file is shorter than it was written", None)


@pytest.mark.parametrize("refusal", [None, errno.EINVAL, errno.EACCES])
def test_the_page_cache_is_avoided_where_the_file_system_can(
    refusal: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system that does not take O_DIRECT says EINVAL; another refusal is a problem."""
    tried, opened = [], os.open

    def open_(path: Path, flags: int, mode: int) -> int:
        tried.append(bool(flags & os.O_DIRECT))
        if flags & os.O_DIRECT and refusal is not None:
            raise OSError(refusal, os.strerror(refusal))
        return opened(path, flags & ~os.O_DIRECT, mode)

    monkeypatch.setattr(os, "open", open_)
    disk = disks.look(_place(tmp_path), "rank_0", 1)
    if refusal is None:
        assert (tried, disk.problem) == ([True, True], "")
    elif refusal == errno.EINVAL:
        assert (tried, disk.problem) == ([True, False, True, False], "")
    else:
        assert (tried, disk.problem) == ([True], "Permission denied")


def _config(*words: str) -> Config:
    return compose(["runtime=cpu", "train.steps=100", "parallel.dp=4", *words])


@pytest.mark.parametrize(
    ("words", "newest", "present", "expected"),
    [
        ([], -1, 0, 1),  # at the end
        (["checkpoint.interval_steps=30"], -1, 0, 4),  # 30, 60, 90, 100
        (["checkpoint.interval_steps=30"], 60, 2, 2),
        (["checkpoint.interval_steps=30", "resume=never"], 60, 2, 4),
        (["checkpoint.interval_steps=25"], -1, 0, 4),
        (["checkpoint.interval_steps=1", "checkpoint.keep_last=3"], -1, 0, 4),  # one more while it is written
        (["checkpoint.interval_steps=1", "checkpoint.keep_last=3"], 50, 3, 1),
        (["checkpoint.interval_steps=1", "checkpoint.keep_last=3", "checkpoint.keep_every=50"], -1, 0, 6),
        (["checkpoint.interval_steps=50", "checkpoint.keep_last=3"], -1, 0, 2),
        (["checkpoint.interval_steps=1", "checkpoint.keep_last=3"], 50, 9, 1),  # kept by an earlier start
        (["checkpoint.interval_steps=1", "checkpoint.keep_last=3", "checkpoint.keep_every=50"], 50, 4, 1),
        (["checkpoint.interval_steps=30", "checkpoint.save_at_end=false"], -1, 0, 3),
        (["checkpoint.interval_steps=30", "checkpoint.save_at_end=false"], 90, 3, 1),  # as the time limit comes near
        ([], 100, 1, 0),
        (["checkpoint.interval_steps=30"], 120, 4, 0),  # of a run that was to be longer
    ],
)
def test_how_many_checkpoints_are_to_come(words: list[str], newest: int, present: int, expected: int) -> None:
    assert disks.checkpoints_to_come(_config(*words), newest, present) == expected


def test_every_directory_that_a_run_writes_is_looked_at(tmp_path: Path) -> None:
    """Sizes by hand: fp32 weights and two moments of 12 bytes a parameter."""
    from moe_train.model.arithmetic import count_parameters

    words = (f"run_dir={tmp_path}/run", "checkpoint.interval_steps=10", "checkpoint.keep_last=2")
    cfg = _config(*words)
    size = 12 * count_parameters(cfg.model).total_with_mtp
    found = disks.places(cfg, validate(cfg, 4), 2)
    assert [(p.field, p.shared, p.least_bytes, p.all_bytes) for p in found] == [
        ("run_dir", True, 100 * MIB + 2 * size, 100 * MIB + 3 * size)
    ]
    (tmp_path / "checkpoints/step_00000010").mkdir(parents=True)
    cfg = _config(*words, f"checkpoint.dir={tmp_path}/checkpoints", f"checkpoint.local_dir={tmp_path}/local",
                  f"launcher.scratch_dir={tmp_path}/scratch")  # fmt: skip
    found = disks.places(cfg, validate(cfg, 4), 2)
    assert [(p.field, p.shared, p.least_bytes, p.all_bytes) for p in found] == [
        ("run_dir", True, 100 * MIB, 100 * MIB),
        ("checkpoint.dir", True, 2 * size, 2 * size),
        ("checkpoint.local_dir", False, 2 * size // 2, 2 * size // 2),
        ("launcher.scratch_dir", False, 200 * MIB, 200 * MIB),
    ]


@pytest.mark.parametrize(
    ("steps", "keep", "present", "expected"),
    [(100, 3, 0, 4), (100, 3, 2, 2), (100, 3, 9, 1), (20, 3, 0, 2), (20, 3, 1, 1), (0, 3, 0, 0)],
)
def test_a_local_disk_holds_the_newest_and_the_one_that_is_written(
    steps: int, keep: int, present: int, expected: int, tmp_path: Path
) -> None:
    """Two of the four ranks write half of each checkpoint there; `steps` are left, of one every ten."""
    root = tmp_path / "run/checkpoints"
    (root / f"step_{100 - steps:08d}").mkdir(parents=True)
    cfg = _config(f"run_dir={tmp_path}/run", "checkpoint.interval_steps=10", f"checkpoint.local_keep={keep}",
                  f"checkpoint.local_dir={tmp_path}/local")  # fmt: skip
    near = run_directory.node_local_dir(cfg, cfg.checkpoint_root)
    assert near is not None
    for number in range(present):
        (near / f"step_{number:08d}").mkdir(parents=True)
    (tmp_path / "local/notes").mkdir(parents=True)
    found = {place.field: place for place in disks.places(cfg, validate(cfg, 4), 2)}
    size = checkpoint_bytes(cfg, workload_of(cfg, validate(cfg, 4)))
    local = found["checkpoint.local_dir"]
    assert (local.path, local.shared) == (near, False)
    assert local.least_bytes == local.all_bytes == expected * int(size) // 2


def test_a_nearly_full_run_dir_is_found_before_a_rank_trains(small: Path) -> None:
    """The whole command, with checkpoints that do not fit; a full disk is told before ranks are started."""
    code, text = preflight("none", small / "run")
    assert code == 3, text
    assert "BAD storage" in text
    assert f"every node: run_dir ({small}/run) has " in text
    assert "no single node is to blame: make space, or set other directories" in text
    assert "exclude" not in text
    (small / "filler").write_bytes(
        bytes(16 * MIB - sum(f.stat().st_size for f in small.rglob("*") if f.is_file()) - 65536)
    )


def test_a_full_run_dir_is_told_in_one_line_and_left_as_it_was(small: Path) -> None:
    (small / "filler").write_bytes(bytes(16 * MIB))
    code, text = preflight("none", small)
    assert code == 1
    why = "No space left on device; make space there, or set run_dir=PATH"
    assert text == f"error: run_dir={small} cannot be written: {why}\n"
    assert [path.name for path in small.iterdir()] == ["filler"]
