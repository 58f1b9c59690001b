"""Ranks that `launch.local.launcher` starts: what they find, and how the job ends when one of them fails."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from launch import env, job
from launch.failures import RankError
from launch.local import launcher
from moe_train.config.composition import compose
from moe_train.config.schema import Config
from parallel.errors import ConfigError, LaunchError
from parallel.layout import ParallelLayout
from tests.forked import below


def _layout(ranks: int) -> ParallelLayout:
    return ParallelLayout.resolve(tp=1, pp=1, vpp=1, cp=1, ep=1, etp=1, dp=ranks)


def _config(tmp_path: Path) -> Config:
    return Config(run_dir=str(tmp_path), runtime="cpu", seed=77)


def _start(tmp_path: Path, function: str, ranks: int = 3) -> None:
    launcher.start(_config(tmp_path), _layout(ranks), entry=f"tests.launch.fake_job:{function}")


def _failure(tmp_path: Path, function: str, ranks: int = 3) -> RankError:
    with pytest.raises(RankError) as caught:
        _start(tmp_path, function, ranks)
    assert _ranks_alive() == []
    return caught.value


def _ranks_alive() -> list[psutil.Process]:
    return below(os.getpid())


def _facts(tmp_path: Path, rank: int) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((tmp_path / f"rank_{rank}.json").read_text())
    return facts


def test_every_rank_knows_its_place_and_finds_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "threads_for", lambda ranks: 2)
    _start(tmp_path, "report", 3)
    for rank in range(3):
        assert _facts(tmp_path, rank) == {
            "sum": 3, "threads": 2, "omp": "2", "launcher": "local", "seed": 77, "run_dir": str(tmp_path),
            "local": [rank, 3], "environment": [str(rank), "3", str(rank)],
        }  # fmt: skip
    assert _ranks_alive() == []
    assert compose.from_yaml(tmp_path / "config.yaml") == _config(tmp_path)


def test_output_of_other_ranks_than_0_goes_to_their_logs(tmp_path: Path) -> None:
    _start(tmp_path, "report", 2)
    log = (tmp_path / "logs/rank_1.log").read_text()
    assert "output of rank 1" in log
    assert "warnings of rank 1" in log
    assert "output of rank 0" not in (tmp_path / "logs/rank_0.log").read_text()


def test_threads_can_be_set(tmp_path: Path) -> None:
    cfg = _config(tmp_path)
    cfg.launcher.threads_per_rank = 3
    launcher.start(cfg, _layout(1), entry="tests.launch.fake_job:report")
    assert _facts(tmp_path, 0)["threads"] == 3


def test_ranks_run_where_the_launcher_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    core = min(os.sched_getaffinity(0))
    monkeypatch.setattr(env, "cores_of", lambda info: {core})
    cfg = _config(tmp_path)
    cfg.launcher.environment, cfg.launcher.bind = ["MADE_UP=yes"], "numa"
    cfg.launcher.scratch_dir = str(tmp_path / "scratch")
    launcher.start(cfg, _layout(1), entry="tests.launch.fake_job:surroundings")
    scratch = f"{tmp_path}/scratch/moe-train-{os.getuid()}"
    assert _facts(tmp_path, 0) == {"cores": [core], "variable": "yes", "temporary": [scratch, scratch]}


def test_a_scratch_directory_that_cannot_be_made_is_told_before_ranks_start(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    cfg = _config(tmp_path)
    cfg.launcher.scratch_dir = str(tmp_path / "file")
    with pytest.raises(ConfigError, match=r"launcher\.scratch_dir=.*file cannot be written: Not a directory"):
        launcher.start(cfg, _layout(1), entry="tests.launch.fake_job:surroundings")


def test_ranks_share_the_cores_and_have_at_least_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert [launcher.threads_for(ranks) for ranks in (1, 2, 3, 8, 64)] == [8, 4, 2, 1, 1]


def test_an_explained_error_keeps_its_words_and_exit_code(tmp_path: Path) -> None:
    error = _failure(tmp_path, "fail_explained")
    assert str(error) == "rank 1: the corpus is empty; set data.path"
    assert error.exit_code == 2


def test_a_bug_is_one_line_with_the_traceback_in_a_log(tmp_path: Path) -> None:
    error = _failure(tmp_path, "fail_unexplained")
    log = tmp_path / "logs/rank_0.log"
    assert str(error) == f"rank 0: ValueError: a bug (traceback in {log}; verbose=true shows it)"
    assert error.exit_code == 1
    assert "in fail_unexplained" in log.read_text()
    assert any("in fail_unexplained" in note for note in error.__notes__)


def test_an_error_of_every_rank_is_told_once(tmp_path: Path) -> None:
    error = _failure(tmp_path, "fail_everywhere")
    assert str(error).count("seed=0 is odd; set seed=1") == 1
    assert error.exit_code == 2


def test_an_error_ends_ranks_that_wait_for_nothing(tmp_path: Path) -> None:
    assert "rank 1 had enough" in str(_failure(tmp_path, "hang_alone"))
    assert time.time() - (tmp_path / "hanging_1").stat().st_mtime < 5


def test_a_killed_rank_is_named_with_the_likely_cause(tmp_path: Path) -> None:
    error = _failure(tmp_path, "killed")
    assert str(error).startswith("rank 1 was killed by SIGKILL; most often it was out of memory")
    assert error.exit_code == 1


def test_a_crash_in_native_code_leaves_the_stack_in_the_log(tmp_path: Path) -> None:
    log = tmp_path / "logs/rank_1.log"
    assert str(_failure(tmp_path, "crash", 2)) == f"rank 1 was killed by SIGSEGV; native code crashed, see {log}"
    assert "Segmentation fault" in log.read_text()
    assert "in crash" in log.read_text()


def test_an_error_of_an_earlier_run_in_the_same_directory_is_forgotten(tmp_path: Path) -> None:
    _failure(tmp_path, "fail_explained")
    assert str(_failure(tmp_path, "killed")).startswith("rank 1 was killed")
    _start(tmp_path, "report", 2)


def test_an_entry_that_is_no_function_is_named(tmp_path: Path) -> None:
    assert "'tests.launch.fake_job:nothing' has no such function" in str(_failure(tmp_path, "nothing", 1))


def test_a_run_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LaunchError, match=r"run_dir=.*file/x cannot be written"):
        job.save_config(_config(tmp_path / "file" / "x"))


def test_too_few_gpus_shows_the_arithmetic() -> None:
    layout = ParallelLayout.resolve(tp=2, pp=2, vpp=1, cp=1, ep=1, etp=1, dp=2)
    job.check_gpus(layout, 8)
    with pytest.raises(ConfigError, match=r"tp 2 x pp 2 x cp 1 x dp 2 = 8 ranks, and 4 GPUs"):
        job.check_gpus(layout, 4)


def test_ranks_for_cuda_are_spawned_since_cuda_does_not_survive_a_fork(tmp_path: Path) -> None:
    cfg = _config(tmp_path)
    cfg.runtime = "cuda"
    launcher.start(cfg, _layout(2), entry="tests.launch.fake_job:report")
    assert [_facts(tmp_path, rank)["sum"] for rank in range(2)] == [1, 1]
    assert _ranks_alive() == []
