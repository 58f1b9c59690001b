"""Local ranks that start again after one has failed."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch import local
from launch.failures import RankError
from moe_train.config.schema import Config
from parallel.layout import ParallelLayout


def start(run_dir: Path, function: str, restarts: int | None, resume: str = "never") -> None:
    cfg = Config(run_dir=str(run_dir), runtime="cpu", resume=resume)
    cfg.launcher.restarts = restarts
    layout = ParallelLayout.resolve(tp=1, pp=1, vpp=1, cp=1, ep=1, etp=1, dp=2)
    local.start(cfg, layout, entry=f"tests.launch.fake_job:{function}")


def attempts(run_dir: Path) -> list[str]:
    """What rank 0 was told about resuming in each start."""
    return [path.read_text() for path in sorted(run_dir.glob("attempt_*_0"))]


def test_ranks_start_again_from_the_newest_checkpoint(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    start(tmp_path, "killed_twice", restarts=2)
    assert attempts(tmp_path) == ["never", "never", "auto"]  # there was no checkpoint of this job before
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning: rank 1 was killed")]
    assert [line.rpartition("; ")[2] for line in lines] == [f"starting again, {n} of 2 times" for n in (1, 2)]


def test_a_checkpoint_of_an_earlier_run_does_not_count(tmp_path: Path) -> None:
    old = tmp_path / "checkpoints" / "step_00000009"
    old.mkdir(parents=True)
    (old / "state.json").write_text("{}")
    start(tmp_path, "killed_twice", restarts=2)
    assert attempts(tmp_path) == ["never", "never", "auto"]


@pytest.mark.parametrize(("restarts", "starts"), [(1, 2), (0, 1), (None, 1)])
def test_the_budget_is_kept(tmp_path: Path, restarts: int | None, starts: int) -> None:
    with pytest.raises(RankError, match="killed by SIGKILL"):
        start(tmp_path, "killed_twice", restarts)
    assert len(attempts(tmp_path)) == starts


def test_what_would_fail_again_is_not_tried_again(tmp_path: Path) -> None:
    with pytest.raises(RankError) as failed:
        start(tmp_path, "diverge", restarts=3)
    assert failed.value.exit_code == 5
    assert len(attempts(tmp_path)) == 1


def test_a_stopped_rank_is_found_by_the_others_and_replaced(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    start(tmp_path, "stopped_once", restarts=1)
    assert len(attempts(tmp_path)) == 2
    assert "rank 1 " in (errors := capfd.readouterr().err)
    assert "gives no sign of life, last seen after step 0 (stacks in" in errors
    stacks = (tmp_path / "logs/hang_rank_0.txt").read_text()
    assert stacks.startswith("--- rank 0 made no progress for 1.")
    assert "in all_reduce" in stacks
