"""What the Makefile refuses before it creates or downloads anything."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def python_of_version(directory: Path, version: str) -> Path:
    """An interpreter that reports another version; `-m venv` records that it ran and fails."""
    fake = directory / "python"
    major_minor = tuple(map(int, version.split(".")))
    fake.write_text(
        f'#!/bin/sh\n[ "$1" = -m ] && {{ touch "{directory}/venv_was_asked_for"; exit 9; }}\n'
        f'exec "{sys.executable}" -c "import sys; sys.version_info = (*{major_minor}, 0); exec(sys.argv[1])" "$2"\n'
    )
    fake.chmod(0o755)
    return fake


def make_train(directory: Path, version: str) -> subprocess.CompletedProcess[str]:
    fake = python_of_version(directory, version)
    command = ["make", "--no-print-directory", "train", f"PYTHON={fake}", f"VENV={directory}/venv"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("version", ["3.9", "3.10", "3.14", "4.0"])
def test_an_unsupported_python_is_refused_before_anything_is_installed(version: str, tmp_path: Path) -> None:
    done = make_train(tmp_path, version)
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert errors == [f"error: this is Python {version}; name one from 3.11 to 3.13, such as PYTHON=python3.12"]
    assert not (tmp_path / "venv_was_asked_for").exists()


@pytest.mark.parametrize("version", ["3.11", "3.13"])
def test_a_supported_python_makes_the_environment(version: str, tmp_path: Path) -> None:
    make_train(tmp_path, version)
    assert (tmp_path / "venv_was_asked_for").exists()


def test_the_makefile_and_the_package_accept_the_same_pythons() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == ">=3.11,<3.14"
