"""What a run will write, and what a directory is able to take."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.preflight import disks
from moe_train.config.composition.compose import compose
from moe_train.config.composition.validate import validate
from moe_train.config.schema import Config
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


def _place(path: Path) -> disks.Place:
    return disks.Place("run_dir", path, True, 0, 0)


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
        ([], 100, 1, 0),
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
