"""`moe-train` from the command line to its exit code, with a fake job in place of training."""

from __future__ import annotations

import json
from pathlib import Path

from tests.launch import programs


def test_an_error_of_a_rank_is_shown_once_with_the_rank(tmp_path: Path) -> None:
    result = programs.run("fail_explained", tmp_path, 3)
    assert result.stderr.strip() == "error: rank 1: the corpus is empty; set data.path"
    assert result.returncode == 2


def test_verbose_shows_the_traceback_of_the_rank(tmp_path: Path) -> None:
    result = programs.run("fail_unexplained", tmp_path, 2, "verbose=true")
    assert result.stderr.count("in fail_unexplained") == 1
    assert result.stderr.strip().splitlines()[-1].startswith("error: rank 0: ValueError: a bug")
    assert result.returncode == 1


def test_rank_0_has_the_terminal_and_nothing_else_is_printed(tmp_path: Path) -> None:
    result = programs.run("report", tmp_path, 2)
    assert (result.stdout.strip(), result.stderr.strip()) == ("output of rank 0", "warnings of rank 0")
    assert result.returncode == 0


def test_a_wrong_config_starts_no_process(tmp_path: Path) -> None:
    result = programs.run("report", tmp_path / "run", 2, "parallel.tp=3")
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_multirun_runs_jobs_one_after_another(tmp_path: Path) -> None:
    result = programs.run("report", tmp_path, 2, "-m", "seed=5,6")
    assert result.returncode == 0, result.stderr
    for number, seed in ((0, 5), (1, 6)):
        facts = json.loads((tmp_path / str(number) / "rank_1.json").read_text())
        assert (facts["seed"], facts["sum"]) == (seed, 1)
        assert (tmp_path / str(number) / "config.yaml").exists()
