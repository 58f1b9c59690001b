"""Local ranks that start again after one has failed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from launch import restarts
from launch.failures import RankError
from launch.local import launcher
from launch.slurm import commands
from moe_train.config.composition import compose
from moe_train.config.launcher import LauncherConfig
from moe_train.config.schema import Config
from moe_train.formats import run_directory
from parallel.errors import LaunchError
from parallel.layout import ParallelLayout
from tests import forked
from tests.launch import programs


def start(run_dir: Path, function: str, restarts: int | None, resume: str = "never") -> None:
    cfg = Config(run_dir=str(run_dir), runtime="cpu", resume=resume)
    cfg.launcher.restarts = restarts
    layout = ParallelLayout.resolve(tp=1, pp=1, vpp=1, cp=1, ep=1, etp=1, dp=2)
    launcher.start(cfg, layout, entry=f"tests.launch.fake_job:{function}")


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
    assert "sends no heartbeat, last seen after step 0 (stacks in" in errors
    stacks = (tmp_path / "logs/hang_rank_0.txt").read_text()
    assert stacks.startswith("--- rank 0 made no progress for 1.")
    assert "in all_reduce" in stacks


def _save(root: Path, step: int) -> None:
    (root / f"step_{step:08d}").mkdir(parents=True, exist_ok=True)
    (root / f"step_{step:08d}/state.json").write_text("{}")


def test_a_later_start_of_a_batch_job_continues_what_the_job_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing else: another job may have used the directory before, and was not to be continued."""
    cfg = Config(run_dir=str(tmp_path))
    cfg.checkpoint.dir = str(tmp_path / "elsewhere")
    restarts.remember(cfg)
    assert restarts.overrides() == []  # no batch job
    _save(tmp_path / "elsewhere", 9)
    monkeypatch.setenv(restarts.FIRST, str(tmp_path / ".first"))
    for _ in range(2):  # the second start of this job, which has saved nothing yet
        assert restarts.overrides() == []
        restarts.remember(cfg)
    _save(tmp_path / "elsewhere", 10)
    restarts.remember(cfg)
    assert restarts.overrides() == ["resume=auto"]
    monkeypatch.setenv(restarts.FIRST, str(tmp_path / ".another"))
    assert restarts.overrides() == []


def test_a_checkpoint_that_someone_removes_is_none_that_the_job_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others are still of the run that was not to be continued."""
    monkeypatch.setenv(restarts.FIRST, str(tmp_path / ".first"))
    for step in (8, 9):
        _save(tmp_path / "checkpoints", step)
    restarts.remember(Config(run_dir=str(tmp_path)))
    shutil.rmtree(tmp_path / "checkpoints/step_00000008")
    assert restarts.overrides() == []
    _save(tmp_path / "checkpoints", 10)
    assert restarts.overrides() == ["resume=auto"]


@pytest.mark.parametrize(
    ("resume", "older", "counts"),
    [("never", "", True), ("never", "checkpoints", False), ("never", "disk", False), ("/a/checkpoint", "", False)],
)
def test_a_first_checkpoint_on_the_nodes_disks_is_continued(
    resume: str, older: str, counts: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once it is complete, and only where nothing else could be continued should another node have lost its part."""
    monkeypatch.setenv(restarts.FIRST, str(tmp_path / ".first"))
    cfg = Config(run_dir=str(tmp_path), resume=resume)
    cfg.checkpoint.local_dir = str(tmp_path / "disk")
    near = run_directory.node_local_dir(cfg, cfg.checkpoint_root)
    assert near is not None
    if older:  # of an earlier run with the same directories
        _save({"checkpoints": cfg.checkpoint_root, "disk": near}[older], 9)
    restarts.remember(cfg)
    _save(near, 10)
    assert restarts.overrides() == []
    (near / "step_00000010/manifest.json").touch()
    assert restarts.overrides() == (["resume=auto"] if counts else [])


@pytest.mark.parametrize(
    "text", ["", "[]", '{"dir": "checkpoints"}', '{"dir": ".", "checkpoints": 3}',
             pytest.param("[" * 100_000, id="nested")],
)  # fmt: skip
def test_a_damaged_note_of_the_first_start_does_not_restart_from_scratch(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(restarts.FIRST, str(tmp_path / ".first"))
    (tmp_path / ".first").write_text(text)
    assert restarts.overrides() == ["resume=auto"]


def test_a_first_start_that_cannot_be_noted_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A requeue would else start from scratch over what this start saves."""
    (tmp_path / "file").touch()
    monkeypatch.setenv(restarts.FIRST, str(tmp_path / "file/.first"))
    with pytest.raises(LaunchError, match=rf"run_dir={tmp_path} cannot be written: Not a directory; set run_dir=PATH"):
        restarts.remember(Config(run_dir=str(tmp_path)))


_ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


@pytest.mark.parametrize("variables", [_ALONE, {}], ids=["torchrun", "moe-train"])
def test_ranks_find_out_themselves_that_they_are_started_again(variables: dict[str, str], tmp_path: Path) -> None:
    """From the composed config, whichever file sets `checkpoint.dir`, and although what they began with is gone."""
    env = programs.environment(**variables, **{restarts.FIRST: str(tmp_path / ".first")})
    _save(tmp_path / "old", 9)
    words = [f"resume={tmp_path}/old/step_00000009", "launcher.preflight=check"]
    for expected in (f"{tmp_path}/old/step_00000009", "auto"):
        command = programs.arguments("report", tmp_path, 1, *words)
        done = forked.run(command, cwd=programs.ROOT, env=env, capture_output=True, text=True, timeout=90)
        assert done.returncode == 0, done.stderr
        assert compose.from_yaml(tmp_path / "config.yaml").resume == expected
        assert [line for line in done.stderr.splitlines() if line.startswith("warning: ")] == [
            "warning: moe-submit alone acts on launcher.preflight=check; launch/train.sbatch takes MOE_PREFLIGHT"
        ]
        _save(tmp_path / "checkpoints", 10)
        shutil.rmtree(tmp_path / "old", ignore_errors=True)


def test_a_field_that_is_not_heard_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    settings = LauncherConfig(start="torchrun", preflight="check", container="image")
    monkeypatch.setenv("MOE_START", "torchrun")
    commands.warn_unheard(settings)
    told = capsys.readouterr().err
    assert told.startswith("warning: moe-submit alone acts on launcher.preflight=check, launcher.container=image; ")
    assert told.count("\n") == 1
    commands.warn_unheard(LauncherConfig(start="torchrun"))
    monkeypatch.setenv("MOE_SUBMITTED", "2026-01-01_00-00-00")
    commands.warn_unheard(settings)
    assert capsys.readouterr().err == ""
