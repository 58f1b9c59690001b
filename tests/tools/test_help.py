"""`--help` of every command: what it is for, the common overrides with their meaning, at once."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import forked
from tests.startup import startup

ROOT = Path(__file__).parents[2]
COMMANDS = {
    "moe-train": "launch.main", "moe-submit": "launch.slurm.submit", "moe-preflight": "launch.preflight",
    "moe-plan": "tools.plan", "moe-memory": "tools.memory", "moe-convert": "tools.convert",
    "moe-inspect": "tools.inspect", "moe-data": "tools.prepare_data", "moe-dryrun": "tools.dryrun",
    "moe-evaluate": "tools.evaluate", "moe-schedule": "tools.schedule",
    "moe-generate": "tools.generate", "moe-chat": "tools.chat", "moe-serve": "tools.serve",
}  # fmt: skip
# A field that the page of a command must explain, with words of its doc in the schema.
EXPLAINED = {
    "moe-train": ("train.tokens=null", "Training tokens"), "moe-submit": ("launcher.nodes=null", "Nodes of the job"),
    "moe-preflight": ("launcher.slow_ratio=1.5", "multiple of the median time"),
    "moe-plan": ("plan.gpus=null", "GPUs to plan for"),
    "moe-memory": ("parallel.pp=1", "Pipeline-parallel degree"),
    "moe-convert": ("convert.dtype=null", "bf16 for quantised ones"),
    "moe-inspect": ("inspect.norm_rtol=null", "norm-relative"),
    "moe-data": ("model.vocab_size=4096", "at most model.vocab_size entries"),
    "moe-dryrun": ("model.mtp_num_layers=0", "prediction"),
    "moe-evaluate": ("evaluate.max_tokens=null", "Tokens to score of each source"),
    "moe-schedule": ("view.plot=null", "PNG file"),
    "moe-generate": ("generate.n=1", "Continuations of each"), "moe-chat": ("chat.system=null", "System message"),
    "moe-serve": ("serve.port=8000", "Port"),
}  # fmt: skip


@pytest.mark.parametrize("option", ["--help", "-h"])
@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_the_command(
    command: str, option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [command, "model=tiny", option])
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as end:
        importlib.import_module(COMMANDS[command]).main()
    assert end.value.code == 0
    said = capsys.readouterr()
    assert said.out.startswith(f"`{command}`: ")
    assert f"\n    {command} " in said.out, "an example"
    assert "docs/configuration.md" in said.out
    field, meaning = EXPLAINED[command]
    assert f"\n  {field}" in said.out
    assert meaning in " ".join(said.out.split())
    assert max(map(len, said.out.splitlines())) <= 80
    assert len(said.out.splitlines()) < 80
    assert said.err == ""


@pytest.mark.parametrize("command", ["moe-train", "moe-preflight", "moe-plan", "moe-chat"])
def test_help_starts_quickly_and_without_torch(command: str) -> None:
    calls, slow = startup(f"import {COMMANDS[command]} as command; command.main()", "--help")
    assert slow == []
    assert calls < 650_000


def _into_a_closed_pipe(module: str, *words: str) -> tuple[int, str]:
    """Exit code and errors of a command whose reader is gone: `| head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = forked.run(
            [sys.executable, "-m", module, *words], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True,
            timeout=60,
        )  # fmt: skip
    finally:
        os.close(writer)
    return done.returncode, done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_help_whose_reader_is_gone_ends_quietly(command: str) -> None:
    assert _into_a_closed_pipe(COMMANDS[command], "--help") == (0, "")


def test_the_config_of_a_run_whose_reader_is_gone_ends_quietly() -> None:
    assert _into_a_closed_pipe("launch.main", "--cfg", "job") == (0, "")
    assert _into_a_closed_pipe("tools.memory") == (1, "")  # its exit code would have been part of the answer


def test_help_for_a_full_disk_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        done = forked.run(
            [sys.executable, "-m", "tools.plan", "--help"], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True,
            timeout=60,
        )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.splitlines()[0].startswith("error: the output cannot be written: No space left")
    assert "Traceback" not in done.stderr
