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


VENV = """#!/bin/sh
[ "$1" = -c ] && exit 0
mkdir -p "$3/bin"
for name in pip moe-train; do
  printf '#!/bin/sh\\necho "%s $*" >>"%s"\\n' $name "{log}" >"$3/bin/$name" && chmod +x "$3/bin/$name"
done
"""
INSTALL = "pip install --disable-pip-version-check --constraint constraints.txt"


def commands_of(directory: Path, target: str, *more: str) -> list[str]:
    """What a target runs from the environment that it makes. No program of it does anything."""
    log, python = directory / "log", directory / "python"
    python.write_text(VENV.format(log=log))
    python.chmod(0o755)
    words = ["make", "--no-print-directory", target, f"PYTHON={python}", f"VENV={directory}/venv", *more]
    subprocess.run(words, cwd=ROOT, check=True, capture_output=True, timeout=120)
    return log.read_text().splitlines()


@pytest.mark.parametrize(
    ("index", "option"),
    [((), ""), (("TORCH_INDEX=https://index.example/cpu",), "--index-url https://index.example/cpu ")],
)
def test_training_installs_what_it_needs_only(index: tuple[str, ...], option: str, tmp_path: Path) -> None:
    found = commands_of(tmp_path, "train", *index)
    assert found[:2] == [f"{INSTALL} {option}torch", f"{INSTALL} --editable ."]
    assert [line.split()[0] for line in found[2:]] == ["moe-train"]
    again = commands_of(tmp_path, "setup", *index)
    assert again[len(found) :] == [f"{INSTALL} --editable .[dev]"]
