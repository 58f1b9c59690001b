"""Runs `moe-train` with a fake job in a process of its own, as a user does."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests import forked

ROOT = Path(__file__).resolve().parents[2]
_LAUNCHERS = ("SLURM_", "PMI_", "PMIX_", "OMPI_", "TORCHELASTIC_")
_RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def environment(**more: str) -> dict[str, str]:
    """This process's environment without what a launcher may have set."""
    kept = {k: v for k, v in os.environ.items() if k not in _RANK and not k.startswith(_LAUNCHERS)}
    return kept | {"PYTHONPATH": str(ROOT)} | more


def overrides(run_dir: Path, ranks: int) -> list[str]:
    """A valid job on `ranks` ranks that needs no data."""
    return [
        f"run_dir={run_dir}", "runtime=cpu", "data.source=none", f"parallel.dp={ranks}",
        f"batch.global_batch_size={ranks}", "train.steps=1", "schedule.warmup_steps=0",
    ]  # fmt: skip


def arguments(function: str, run_dir: Path, ranks: int, *more: str) -> list[str]:
    """The command line of that job."""
    return [sys.executable, "-m", "tests.launch.command", function, *more, *overrides(run_dir, ranks)]


def run(function: str, run_dir: Path, ranks: int, *more: str) -> subprocess.CompletedProcess[str]:
    """Run the job to its end."""
    command = arguments(function, run_dir, ranks, *more)
    return forked.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=90)


@contextmanager
def started(
    function: str, run_dir: Path, ranks: int, before: Sequence[str] = (),
    start: Callable[..., subprocess.Popen[str]] = forked.Popen, **more: str,
) -> Iterator[subprocess.Popen[str]]:  # fmt: skip
    """The job, in a process group of its own, with further variables. Nothing of it is left afterwards. `before` is
    what its command line begins with, such as nohup."""
    process = start(
        [*before, *arguments(function, run_dir, ranks)], cwd=ROOT, env=environment(**more), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@contextmanager
def hanging(function: str, run_dir: Path, ranks: int, before: Sequence[str] = ()) -> Iterator[subprocess.Popen[str]]:
    """The job, once its ranks hang."""
    with started(function, run_dir, ranks, before) as process:
        wait_for(lambda: len(list(run_dir.glob("hanging_*"))) == ranks or process.poll() is not None, 90)
        assert process.poll() is None, process.communicate()
        yield process


def wait_for(condition: Callable[[], bool], timeout_s: float) -> float:
    """Poll until `condition` holds; returns the seconds that took. AssertionError when it takes longer."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() < began + timeout_s, f"waited {timeout_s} s"
        time.sleep(0.02)
    return time.monotonic() - began


def alive(group: int) -> list[psutil.Process]:
    """Processes of a process group that still run."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found
