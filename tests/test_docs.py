"""Every command in a ```bash block of the README and of docs/ runs, from a directory like a fresh clone."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Added to training commands only, so that each takes seconds: what they show is the command, not the length.
SHORT = [
    "train.steps=2",
    "schedule.warmup_steps=1",
    "train.eval_batches=1",
    "train.sample_continuations=0",
    "train.seq_length=32",
    "schedule.on_resume=override",  # each command of a block is a step longer than the one before
]


def blocks() -> list[tuple[str, list[str]]]:
    """(page and number, commands) of each bash block."""
    found = []
    for page in PAGES:
        for number, block in enumerate(re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)):
            found.append((f"{page.name}-{number}", block.strip().splitlines()))
    return found


def cases() -> list[Any]:
    """The blocks. Those that train are slow, but for the two that a newcomer meets first."""
    found = []
    for name, commands in blocks():
        slow = name not in ("README.md-0", "README.md-1") and any(
            trains(shlex.split(line, comments=True)) for line in commands
        )
        found.append(pytest.param(name, commands, id=name, marks=pytest.mark.slow if slow else ()))
    return found


def trains(words: list[str]) -> bool:
    return words[0] == "moe-train" and "--cfg" not in words and "runtime=simulated" not in words


def test_there_are_commands_to_run() -> None:
    """The pattern still finds them, on most pages."""
    assert len(blocks()) >= 8
    assert {name.split("-")[0] for name, _ in blocks()} >= {"README.md", "parallelism.md", "planning.md", "data.md"}


@pytest.mark.parametrize(("name", "commands"), cases())
def test_commands_of_a_block_run(name: str, commands: list[str], tmp_path: Path, small_data: tuple[str, ...]) -> None:
    """In order, in one directory, each with exit code 0."""
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "README.md", tmp_path / "README.md")
    shutil.copy(ROOT / "LICENSE", tmp_path / "LICENSE.txt")
    steps = 0
    for line in commands:
        words = shlex.split(line, comments=True)
        if words[0] == "moe-data" and len(words) == 1:
            continue  # the default corpus: `make train` makes it
        own_data = any(word.startswith("data") for word in words)
        if trains(words):
            steps += 1
            words += [*SHORT, f"train.steps={1 + steps}", *([] if own_data else small_data)]
        program = shutil.which(words[0], path=str(Path(sys.executable).parent))
        assert program, f"{words[0]} is not installed"
        environment = dict(os.environ) | {"PYTHONWARNINGS": "ignore"}
        done = subprocess.run(
            [program, *words[1:]], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


def test_links_between_pages_hold() -> None:
    """Every relative link names a file."""
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links {target}"


def test_configuration_page_is_current() -> None:
    """Its tables are those of the schema: `python -m tools.config_reference` writes them."""
    from tools.config_reference import PAGE, page

    assert PAGE.read_text(encoding="utf-8") == page()
