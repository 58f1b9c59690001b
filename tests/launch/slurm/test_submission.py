"""What is kept of a submission: the code, and where it comes from."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from launch.slurm import submission
from moe_train.config.schema import Config


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
