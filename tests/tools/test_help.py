"""`--help` of every tool is about the tool, not about the framework that composes its configuration."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tools import convert, dryrun, inspect, memory, plan, prepare_data

TOOLS = {"moe-plan": plan, "moe-memory": memory, "moe-convert": convert, "moe-inspect": inspect,
         "moe-data": prepare_data, "moe-dryrun": dryrun}  # fmt: skip


@pytest.mark.parametrize("option", ["--help", "-h"])
@pytest.mark.parametrize("command", TOOLS)
def test_help_says_what_the_command_is_for(
    command: str, option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [command, "model=tiny", option])
    with pytest.raises(SystemExit) as end:
        TOOLS[command].main()
    assert end.value.code == 0
    said = capsys.readouterr()
    assert said.out.startswith(f"`{command}`: ")
    assert "docs/configuration.md" in said.out
    assert said.err == ""


def test_help_for_a_full_disk_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "tools.plan", "--help"], cwd=Path(__file__).parents[2], stdout=full,
            stderr=subprocess.PIPE, text=True, timeout=60,
        )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.splitlines()[0].startswith("error: the output cannot be written: No space left")
    assert "Traceback" not in done.stderr
