"""`moe-submit data`, and the script that it gives to Slurm."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.slurm import commands
from launch.slurm import submit as moe_submit
from tests.data.corpora import texts, write_txt
from tests.launch.programs import ROOT, environment

SBATCH = """printf '%s\\n' "$MOE_CODE" "$MOE_REQUEUES" "$@" >"$LOG"; echo 71"""
SINFO = "echo 'cpu*|8|2-00:00:00|(null)|idle'"
SCONTROL = "echo 'PartitionName=cpu AllowAccounts=ALL MaxNodes=UNLIMITED State=UP'"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with text, on a login node of a cluster of CPU nodes."""
    (tmp_path / "bin").mkdir()
    for name, text in {"sbatch": SBATCH, "sinfo": SINFO, "scontrol": SCONTROL}.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    monkeypatch.chdir(tmp_path)
    write_txt(tmp_path / "text", texts(3))
    return tmp_path


WORDS = ("data", "data=text", "data.path=text", "data.dir=out", "launcher.nodes=3", "launcher.time_limit_min=90")


def test_a_dry_run_prints_the_command_and_leaves_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert moe_submit.run([*WORDS, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "sbatch --parsable --job-name=moe-data-text --nodes=3 --ntasks-per-node=1 --time=90 " in printed
    assert printed.rstrip().endswith(
        f"{commands.DATA_SCRIPT} data=text data.path={here}/text data.dir={here}/out launcher.nodes=3 "
        "launcher.time_limit_min=90"
    )
    assert not (here / "log").exists()
    assert not (here / "out").exists()


def test_the_job_runs_a_copy_of_the_code_that_is_kept_with_the_dataset(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert moe_submit.run(list(WORDS)) == 0, capsys.readouterr().err
    (place,) = (here / "out/submissions").iterdir()
    code, requeues, *command = (here / "log").read_text().splitlines()
    assert (code, requeues) == (str(place / "code"), "100")
    assert f"{place}/code/launch/data.sbatch" in command
    assert (place / "code/launch/data.sbatch").is_file()
    assert json.loads((place / "submission.json").read_text())["jobs"] == ["71"]


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("data.path=nowhere", "error: data.path=nowhere has no .txt"),
        ("launcher.nodes=9", "error: the job needs 9 nodes, and partition cpu has 8"),
        ("launcher.partition=gpu", "error: launcher.partition=gpu is not a partition of this cluster"),
    ],
)
def test_what_cannot_run_is_refused(word: str, told: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert moe_submit.run([*WORDS, word]) == 2
    error = capsys.readouterr().err
    assert error.startswith(told)
    assert error.count("\n") == 1
    assert not (here / "log").exists()


def run_script(directory: Path, srun: str, *overrides: str) -> tuple[int, str]:
    """Exit code and output of data.sbatch, where `srun` is what that command does."""
    (directory / "bin").mkdir(exist_ok=True)
    for name, text in {"srun": srun, "scontrol": f'echo "scontrol $*" >>{directory}/log; kill -KILL $PPID'}.items():
        (directory / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (directory / "bin" / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node1", "SLURM_SUBMIT_DIR": str(directory),
           "MOE_PYTHON": sys.executable, "MOE_CODE": str(ROOT),
           "PATH": f"{directory / 'bin'}:{os.environ['PATH']}"}  # fmt: skip
    done = subprocess.run(
        ["bash", str(commands.DATA_SCRIPT), *overrides], env=environment(**job), cwd=directory, capture_output=True,
        text=True, timeout=60,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def test_the_script_returns_the_exit_code_of_the_tasks(tmp_path: Path) -> None:
    echo = f'printf "%s\\n" "$@" >{tmp_path}/words; exit 2'
    assert run_script(tmp_path, echo, "data=text", "data.path=my text")[0] == 2
    words = (tmp_path / "words").read_text().splitlines()
    assert words[-6:] == [sys.executable, "-P", "-m", "tools.prepare_data", "data=text", "data.path=my text"]


def test_near_its_time_limit_the_job_goes_back_to_the_queue(tmp_path: Path) -> None:
    code, _ = run_script(tmp_path, "kill -USR1 $PPID; sleep 20")
    assert code == -9, "as if Slurm had ended the script"
    assert (tmp_path / "log").read_text() == "scontrol requeue 7\n"
