"""Faults that other commands than a training run meet: disks before a job, and jobs of a chain on Slurm."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from bench.fault_runs import ROOT, SMALL

_RANKS = (
    "parallel.dp=2",
    "data.source=none",
    "train.steps=1",
    "schedule.warmup_steps=0",
    "launcher.threads_per_rank=1",
)
_MIB = 1 << 20
_CYCLE_S = (0.45, 0.05)  # stopped, running
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


@dataclass(frozen=True)
class Check:
    """One row: `moe-preflight` meets a fault.

    Args:
        settings: further overrides. `{dir}` is filled in.
        around: what holds while the command runs, in the directory of the row.
        meanwhile: acts on the running command.
        code: its exit code.
        found: text of the line that reports the defect; "" where there is none.
    """

    name: str
    settings: tuple[str, ...] = ()
    around: Callable[[Path], AbstractContextManager[object]] = nullcontext
    meanwhile: Callable[[subprocess.Popen[str]], None] | None = None
    code: int = 3
    found: str = ""


def checks() -> list[Check]:
    """The rows."""
    run_dir, near = ("run_dir={dir}/small/run",), ("run_dir={dir}/run", "checkpoint.local_dir={dir}/small")
    scratch = ("run_dir={dir}/run", "launcher.scratch_dir={dir}/small")
    return [
        Check("preflight: nothing is wrong", ("run_dir={dir}/run",), code=0),
        Check("preflight: run_dir nearly full", run_dir, _disk(filled=12), found="and the run soon needs"),
        Check("preflight: run_dir full", run_dir, _disk(filled=16), code=1, found="No space left on device"),
        Check("preflight: checkpoint.local_dir full", near, _disk(filled=16), found="No space left on device"),
        Check("preflight: launcher.scratch_dir nearly full", scratch, _disk(filled=12), found="soon needs"),
        Check("preflight: a rank stopped 90 % of the time", ("run_dir={dir}/run",), meanwhile=_stop_a_rank,
              found=" takes "),
    ]  # fmt: skip


def run_check(check: Check, directory: Path) -> dict[str, Any]:
    """One row of the table."""
    place = directory / check.name.replace(" ", "_").replace(":", "")
    place.mkdir()
    words = [*SMALL, *_RANKS, *(setting.format(dir=place) for setting in check.settings)]
    with check.around(place / "small"):
        began = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-m", "launch.preflight", *words], cwd=ROOT, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, env=dict(os.environ) | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        if check.meanwhile:
            threading.Thread(target=check.meanwhile, args=(process,), daemon=True).start()
        output, _ = process.communicate(timeout=600)
    seconds = time.monotonic() - began
    lines = [line.strip() for line in output.splitlines() if check.found and check.found in line]
    holds = process.returncode == check.code and bool(lines) == bool(check.found)
    return _row(check.name, seconds if lines else None, lines[0] if lines else "", [process.returncode], holds)


def _row(name: str, seconds: float | None, told: str, codes: Sequence[int], holds: bool) -> dict[str, Any]:
    return {
        "injected": name,
        "detected_in_s": None if seconds is None else round(seconds, 2),
        "detected_by": told[:160],
        "recovered_in_s": None,
        "steps_lost": 0,
        "exit_codes": list(codes),
        "final_loss_equal": None,
        "holds": holds,
    }


def _disk(filled: int) -> Callable[[Path], AbstractContextManager[object]]:
    """A file system of 16 MiB, of which `filled` are taken. Needs root."""

    @contextmanager
    def around(place: Path) -> Iterator[None]:
        place.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", place], check=True)
        try:
            (place / "filler").write_bytes(bytes(filled * _MIB))
            yield
        finally:
            subprocess.run(["umount", place], check=True)

    return around


def _stop_a_rank(process: subprocess.Popen[str]) -> None:
    """The last rank that the command has started, from the time on at which it computes."""
    with contextlib.suppress(psutil.Error):
        ranks: list[psutil.Process] = []
        while len(ranks) < 2 and process.poll() is None:
            children = psutil.Process(process.pid).children(recursive=True)
            ranks = [child for child in children if child.ppid() != process.pid]  # those of the fork server
            time.sleep(0.05)
        while process.poll() is None:
            for number, seconds in zip((signal.SIGSTOP, signal.SIGCONT), _CYCLE_S, strict=True):
                ranks[-1].send_signal(number)
                time.sleep(seconds)


def chain(directory: Path, data: tuple[str, ...]) -> dict[str, Any] | None:
    """A chain of five jobs on a private Slurm, the first of which completes the run; None without Slurm."""
    if any(shutil.which(name, path=_PATH) is None for name in ("slurmctld", "slurmd", "munged")):
        return None
    run_dir, place = directory / "chain", directory / "slurm"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PATH": _PATH, "SLURM_CONF": str(place / "slurm.conf")}

    def run(*words: str) -> str:
        done = subprocess.run(words, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True)
        return done.stdout

    words = [*SMALL, *data, "train.steps=2", "schedule.warmup_steps=0", "launcher.ranks_per_node=1", "launcher.chain=5",
             "launcher.time_limit_min=30", f"run_dir={run_dir}"]  # fmt: skip
    run(sys.executable, "-m", "tests.slurm.cluster", "start", str(place), "1")
    try:
        run(sys.executable, "-m", "launch.slurm.submit", *words)
        (record,) = run_dir.glob("submissions/*/submission.json")
        links = json.loads(record.read_text())["jobs"]
        began = time.monotonic()
        while run("squeue", "--noheader").strip() and time.monotonic() < began + 600:
            time.sleep(0.5)
        states = [run("scontrol", "show", "job", link).partition("JobState=")[2].split()[0] for link in links]
    finally:
        run(sys.executable, "-m", "tests.slurm.cluster", "stop", str(place))
    holds = states == ["COMPLETED", *["CANCELLED"] * 4]
    return _row("chain of five jobs, the first completes", time.monotonic() - began, " ".join(states), [], holds)
