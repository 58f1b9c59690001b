"""What is kept of a submission: the code, and where it comes from."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from launch.slurm import submission
from moe_train.config.schema import Config
from parallel.errors import ConfigError


def _git(directory: Path, *words: str) -> str:
    author = ("-c", "user.name=a", "-c", "user.email=a@b")
    done = subprocess.run(["git", "-C", str(directory), *author, *words], capture_output=True, text=True, check=True)
    return done.stdout


def _repository(directory: Path) -> Path:
    """One whose only file is committed, with the folders of this project below it, not yet tracked."""
    directory.mkdir()
    _git(directory, "init", "--quiet")
    (directory / "notes.txt").write_text("of another project\n")
    _git(directory, "add", "notes.txt")
    _git(directory, "commit", "--quiet", "-m", "first")
    code = directory / "environment" / "moe_train" / "_code"
    for name in submission.PACKAGES:
        (code / name).mkdir(parents=True)
        (code / name / "__init__.py").write_text("")
    return code


def test_the_commit_is_kept_where_the_code_is_tracked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = _repository(tmp_path / "clone")
    _git(code, "add", ".")
    _git(code, "commit", "--quiet", "-m", "second")
    (code / "tools" / "__init__.py").write_text("changed = True\n")
    monkeypatch.setattr(submission, "ROOT", code)
    kept = submission.take(Config(), tmp_path / "kept")
    assert (kept.parent / "commit.txt").read_text() == _git(code, "rev-parse", "HEAD")
    assert "+changed = True" in (kept.parent / "changes.diff").read_text()
    assert (kept / "tools/__init__.py").read_text() == "changed = True\n"


def test_the_commit_of_a_repository_around_an_installation_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A virtual environment inside somebody's own repository: its commit says nothing about our code."""
    monkeypatch.setattr(submission, "ROOT", _repository(tmp_path / "somebody"))
    kept = submission.take(Config(), tmp_path / "kept")
    assert sorted(path.name for path in kept.parent.iterdir()) == ["code", "config.yaml"]


def test_a_machine_without_git_keeps_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submission, "ROOT", _repository(tmp_path / "clone"))
    monkeypatch.setenv("PATH", str(tmp_path))
    kept = submission.take(Config(), tmp_path / "kept")
    assert sorted(path.name for path in kept.iterdir()) == sorted(submission.PACKAGES)


def test_only_yaml_files_of_a_config_directory_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submission, "ROOT", _repository(tmp_path / "clone"))
    own = tmp_path / "own"
    (own / "model/large").mkdir(parents=True)
    for name in ("a.yaml", "weights.bin", "model/b.yml", "model/notes.txt", "model/large/c.yaml"):
        (own / name).touch()
    place = tmp_path / "kept"
    submission.take(Config(), place, submission.ConfigSources(str(own), "mine"))
    kept = sorted(str(path.relative_to(place / "conf")) for path in (place / "conf").rglob("*") if path.is_file())
    assert kept == ["a.yaml", "model/b.yml", "model/large/c.yaml"]
    words = submission.ConfigSources(str(own), "mine").words(place)
    assert words == [f"--config-dir={place}/conf", "--config-name=mine"]
    assert submission.ConfigSources().words(place) == []


def test_a_job_gets_no_variables_of_the_one_that_submits_it(monkeypatch: pytest.MonkeyPatch) -> None:
    own = {"SLURM_CONF": "/etc/slurm.conf", "PATH": "/bin", "SLURM_JOB_ID": "7", "RANK": "0", "PMI_SIZE": "2"}
    assert submission.clean(own) == {"SLURM_CONF": "/etc/slurm.conf", "PATH": "/bin"}
    asked: list[tuple[tuple[str, ...], dict[str, str] | None]] = []

    def run(*words: str, environment: dict[str, str] | None = None) -> str:
        asked.append((words, environment))
        return "71;main\n"

    monkeypatch.setattr(submission.commands, "run", run)
    monkeypatch.setattr(submission.os, "environ", own)
    record = submission.Submission(["sbatch", "--parsable", "train.sbatch"], {"MOE_CODE": "/code"})
    assert record.submit("--hold") == "71"
    assert record.jobs == ["71"]
    environment = {"SLURM_CONF": "/etc/slurm.conf", "PATH": "/bin", "MOE_CODE": "/code"}
    assert asked == [(("sbatch", "--parsable", "--hold", "train.sbatch"), environment)]


def test_the_newest_submission_counts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not the directory of a run that moe-submit started"):
        submission.newest(tmp_path)
    for name, job in (("2026-01-02_00-00-00", "8"), ("2026-01-01_00-00-00", "7")):
        place = tmp_path / submission.FOLDER / name
        place.mkdir(parents=True)
        submission.write(submission.Submission(["sbatch"], {}, [job]), place)
    assert submission.newest(tmp_path).jobs == ["8"]
