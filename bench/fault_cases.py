"""The faults of `make bench-faults`, one `Case` each. To add a row add a case.

The layout is tp=2 pp=2 ep=2 on four ranks: 0 and 1 hold the first pipeline stage, 2 and 3 the last.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from bench.fault_runs import ROOT, Seen, losses
from moe_train.config.resilience import Fault

STEPS, INTERVAL = 16, 4
LAYOUT = ("parallel.tp=2", "parallel.pp=2", "parallel.ep=2", "launcher.threads_per_rank=1")
GUARDED = ("launcher.restarts=2", f"checkpoint.interval_steps={INTERVAL}", f"train.steps={STEPS}")
_SMALL_FILES = (".metadata", "common.pt", "metadata.json", "state.json", "config.yaml", "manifest.json")
_FILES = ("__0_*.distcp", "__3_*.distcp", *_SMALL_FILES)
_HANG = ("resilience.hang_timeout_s=5",)

_FOUND = r"starting again|warning: (step \d+: |checkpoint|rank|.*not saved)|interrupted by|stopped at step|^error: "

Meanwhile = Callable[["subprocess.Popen[str]", Seen, Path], None]
"""Acts on a command that runs, on what it has shown, and on its run directory."""


@dataclass(frozen=True)
class Case:
    """One row.

    Args:
        inject: entries of resilience.inject.
        settings: further overrides. `{run_dir}` is filled in.
        meanwhile: acts on the running command.
        between: changes the run directory after a first command that stopped before the end; a second one continues.
        around: what holds while the commands of this case run.
        repair: undoes the fault before the command is run again.
        starter: what starts the command, instead of its own launcher.
        found: pattern of the first line that says that something is wrong.
        code: exit code of the command that meets the fault; where it is not 0 the same command is run again.
        changes_losses: whether the fault is meant to change later losses, as a step that is left out does.
        most_lost: steps that may have to be done again.
        harmless: nothing needs to be noticed.
        check: whether the run directory is as it should be at the end.
    """

    name: str
    inject: tuple[Fault, ...] = ()
    settings: tuple[str, ...] = ()
    meanwhile: Meanwhile | None = None
    between: Callable[[Path], None] | None = None
    around: Callable[[Path], AbstractContextManager[object]] = nullcontext
    repair: Callable[[Path], None] | None = None
    starter: Callable[[Path], list[str]] | None = None
    environment: dict[str, str] | None = None
    found: str = _FOUND
    code: int = 0
    changes_losses: bool = False
    most_lost: int = INTERVAL
    harmless: bool = False
    check: Callable[[Path], bool] = lambda run_dir: True


def cases(draw: random.Random, directory: Path) -> list[Case]:
    """The rows, with random steps."""

    def step() -> int:
        return draw.randint(2, STEPS - 2)

    jumping, threadless = directory / "jumping", directory / "threadless"
    for place, code in ((jumping, _JUMPING_CLOCK), (threadless, _NO_THREAD)):
        place.mkdir(exist_ok=True)
        (place / "sitecustomize.py").write_text(code)
    rows = [Case(f"kill -9 of rank {rank}", (Fault("kill", rank=rank, step=step()),)) for rank in range(4)]
    rows += [
        Case(
            f"kill -9 of rank {rank} while saving",
            (Fault("kill", rank=rank, step=2 * INTERVAL, at="end", after=round(draw.uniform(0.005, 0.05), 3)),),
        )
        for rank in range(4)
    ]
    rows += [Case(f"hang of rank {rank}", (Fault("hang", rank=rank, step=step()),), _HANG) for rank in (0, 3)]
    rows += [Case(f"rank {rank} stopped", (Fault("stop", rank=rank, step=step()),), _HANG) for rank in (0, 2)]
    rows += [
        Case("error in the code of a rank", (Fault("raise", rank=2, step=step()),)),
        Case("other code on one rank", starter=_other_code_on_rank_3, code=1),
        Case("NaN batch", (Fault("nan", step=step()),), changes_losses=True),
        Case("NaN in the data of three steps", (Fault("nan", sample=48, samples=24),), changes_losses=True,
             most_lost=2 * INTERVAL),
        Case(
            "loss spike", (Fault("spike", step=INTERVAL + 6, factor=50),),
            ("resilience.spike_factor=3", "resilience.spike_window=4"), changes_losses=True,
        ),
        Case(
            "slow rank", (Fault("slow", rank=1, step=3, steps=100, seconds=0.3),),
            ("resilience.straggler_interval_steps=2", "resilience.straggler_intervals=2"),
        ),
        Case("storm of SIGTERM", meanwhile=_at_step(INTERVAL, _storm(signal.SIGTERM)), code=143),
        Case("Ctrl-C", meanwhile=_at_step(INTERVAL, _storm(signal.SIGINT, 1)), code=130),
        Case("storm of SIGUSR1", (Fault("term", rank=1, step=step(), factor=50),), code=75),
        Case("SIGUSR1 after the last step until the end", meanwhile=_at_step(STEPS, _until_the_end), harmless=True),
        Case("clock that jumps by days", environment={"PYTHONPATH": f"{jumping}:{ROOT}"}, harmless=True),
        Case("disk full while saving", meanwhile=_fill_disk, around=_small_disk, repair=_free_disk, code=2,
             most_lost=STEPS - INTERVAL),
        Case(
            "data file lost before a restart", (Fault("kill", rank=1, step=INTERVAL + 3),),
            ("data.dir={run_dir}/data",), meanwhile=_at_step(INTERVAL, _remove_data), found=r"\.bin is missing", code=2,
            repair=lambda run_dir: shutil.rmtree(run_dir / "data"),  # as the error says
        ),
        Case("kill -9 of a rank in the export", settings=("export_hf=true",), meanwhile=_at_step(STEPS, _kill_rank),
             check=_is_exported, most_lost=0),
        Case("disk full in the export", settings=("export_hf=true",), around=_small_export, repair=_more_for_export,
             code=2, check=_is_exported, most_lost=0),
        Case("run_dir full while metrics are written", settings=("checkpoint.dir={run_dir}_checkpoints",
             "telemetry.tensorboard=true"), around=_small_run_dir, meanwhile=_fill_run_dir,
             found="cannot be written: No space left", check=_has_every_step, most_lost=0),
        Case("second run in the directory", (Fault("slow", rank=1, step=INTERVAL + 1, steps=8, seconds=0.3),),
             meanwhile=_at_step(INTERVAL, _start_another), harmless=True, check=_refused_another, most_lost=0),
        Case("kill -9 of the launcher, which leaves its lock", meanwhile=_at_step(INTERVAL, _kill_launcher),
             harmless=True, code=-signal.SIGKILL),
        Case("a thread that cannot start while saving", environment={"PYTHONPATH": f"{threadless}:{ROOT}"},
             most_lost=0),
        Case(
            "data file damaged at equal size before a restart", (Fault("kill", rank=1, step=INTERVAL + 3),),
            ("data.dir={run_dir}/data",), meanwhile=_at_step(INTERVAL, _damage_data),
            found=r"text_document\.bin is damaged", code=2, repair=lambda run_dir: shutil.rmtree(run_dir / "data"),
        ),
        Case("latest deleted", between=lambda run_dir: (run_dir / "checkpoints" / "latest").unlink(),
             harmless=True, most_lost=0),
        *(Case(f"{name} of the newest checkpoint truncated", between=_truncate(name)) for name in _FILES),
        *(Case(f"{name} of the newest checkpoint with a flipped bit", between=_flip(name)) for name in _FILES),
        *(Case(f"{name} of the newest checkpoint deleted", between=_delete(name))
          for name in ("__1_*.distcp", "common.pt")),
    ]  # fmt: skip
    return rows


_JUMPING_CLOCK = """
import time
_wall, _calls = time.time, [0]
def _jumping():
    _calls[0] += 1
    return _wall() + (1e6 if _calls[0] // 50 % 2 else 0)
time.time = _jumping
"""


_NO_THREAD = """
import os, threading
_start, _begun = threading.Thread.start, [0]
def _refuse_second(self):
    if self.name == "checkpoint" and os.environ.get("RANK") == "1":
        _begun[0] += 1
        if _begun[0] == 2:
            raise RuntimeError("can't start new thread")
    _start(self)
threading.Thread.start = _refuse_second
"""


def _newest(run_dir: Path, name: str) -> list[Path]:
    """Files of the newest checkpoint.

    Raises:
        FileNotFoundError: there is none, so that nothing would be damaged.
    """
    checkpoint = max((run_dir / "checkpoints").glob("step_*"))
    files = list(checkpoint.glob(name))
    if not files:
        raise FileNotFoundError(f"{checkpoint / name}")
    return files


def _truncate(name: str) -> Callable[[Path], None]:
    def act(run_dir: Path) -> None:
        for file in _newest(run_dir, name):
            os.truncate(file, file.stat().st_size // 2)

    return act


def _flip(name: str) -> Callable[[Path], None]:
    def act(run_dir: Path) -> None:
        for file in _newest(run_dir, name):
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 0x10
            file.write_bytes(content)

    return act


def _delete(name: str) -> Callable[[Path], None]:
    def act(run_dir: Path) -> None:
        for file in _newest(run_dir, name):
            file.unlink()

    return act


def _at_step(step: int, act: Meanwhile) -> Meanwhile:
    """Act when the checkpoint of `step` is reported."""

    def wait(process: subprocess.Popen[str], seen: Seen, run_dir: Path) -> None:
        while process.poll() is None and not seen.first(rf"checkpoint of step {step} "):
            time.sleep(0.01)
        act(process, seen, run_dir)

    return wait


def _storm(number: int, times: int = 50) -> Meanwhile:
    def send(process: subprocess.Popen[str], seen: Seen, run_dir: Path) -> None:
        seen.injected = time.monotonic()
        for _ in range(times):
            if process.poll() is None:
                os.killpg(process.pid, number)

    return send


def _until_the_end(process: subprocess.Popen[str], seen: Seen, run_dir: Path) -> None:
    seen.injected = time.monotonic()
    while process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGUSR1)
        time.sleep(0.005)


def _remove_data(process: subprocess.Popen[str], seen: Seen, run_dir: Path) -> None:
    (file,) = (run_dir / "data").glob("*.bin")
    file.unlink()


def _damage_data(process: subprocess.Popen[str], seen: Seen, run_dir: Path) -> None:
    """Flip one bit of the tokens."""
    (file,) = (run_dir / "data").glob("*.bin")
    with file.open("r+b") as stream:
        stream.seek(file.stat().st_size // 2)
        byte = stream.read(1)[0]
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte ^ 0x10]))


def _small_disk(run_dir: Path) -> AbstractContextManager[None]:
    """A file system of 16 MB for the checkpoints."""
    return _mounted(run_dir / "checkpoints", "16m")


def _fill_disk(process: subprocess.Popen[str], seen: Seen, run_dir: Path) -> None:
    """After the first checkpoint leave just enough space for a second one, and take it as soon as that is begun."""
    place = run_dir / "checkpoints"
    first, second = place / f"step_{INTERVAL:08d}", place / f".step_{2 * INTERVAL:08d}.partial"
    while not first.exists() and process.poll() is None:
        time.sleep(0.005)
    size = sum(file.stat().st_size for file in first.iterdir())
    with (place / "filler").open("wb", buffering=0) as filler:
        filler.write(bytes(shutil.disk_usage(place).free - 3 * size // 2))
        while not (second.exists() and any(second.iterdir())) and process.poll() is None:
            pass
        seen.injected = time.monotonic()
        with suppress(OSError):  # when it is full
            while filler.write(bytes(4096)):
                pass


def _free_disk(run_dir: Path) -> None:
    (run_dir / "checkpoints" / "filler").unlink()


def _kill_rank(process: subprocess.Popen[str], seen: Seen, run_dir: Path) -> None:
    seen.injected = time.monotonic()
    os.kill(json.loads((run_dir / "heartbeats" / "rank_1.json").read_text())["pid"], signal.SIGKILL)


def _kill_launcher(process: subprocess.Popen[str], seen: Seen, run_dir: Path) -> None:
    seen.injected = time.monotonic()
    process.kill()


def _is_exported(run_dir: Path) -> bool:
    return (run_dir / "hf" / f"step_{STEPS:08d}" / "manifest.json").exists()


@contextmanager
def _mounted(place: Path, size: str) -> Iterator[None]:
    """A file system of that size. Needs root."""
    place.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", place], check=True)


def _small_export(run_dir: Path) -> AbstractContextManager[None]:
    return _mounted(run_dir / "hf", "64k")


def _more_for_export(run_dir: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=64m", run_dir / "hf"], check=True)


def _small_run_dir(run_dir: Path) -> AbstractContextManager[None]:
    return _mounted(run_dir, "4m")


def _fill_run_dir(process: subprocess.Popen[str], seen: Seen, run_dir: Path) -> None:
    """Between the first and the third checkpoint nothing can be written to the run directory."""
    filler = run_dir / "filler"

    def fill(*_: object) -> None:
        seen.injected = time.monotonic()
        with filler.open("wb", buffering=0) as file, suppress(OSError):
            while file.write(bytes(4096)):
                pass

    _at_step(INTERVAL, fill)(process, seen, run_dir)
    _at_step(3 * INTERVAL, lambda *_: filler.unlink())(process, seen, run_dir)


def _has_every_step(run_dir: Path) -> bool:
    return sorted(losses(run_dir)) == list(range(1, STEPS + 1))


def _start_another(process: subprocess.Popen[str], seen: Seen, run_dir: Path) -> None:
    """The same command a second time."""
    seen.injected = time.monotonic()
    done = subprocess.run(process.args, cwd=ROOT, capture_output=True, text=True, check=False)
    (run_dir / "another.txt").write_text(f"{done.returncode} {done.stderr}")


def _refused_another(run_dir: Path) -> bool:
    told = (run_dir / "another.txt").read_text()
    return told.startswith("2 ") and "is in use by process" in told


def _other_code_on_rank_3(run_dir: Path) -> list[str]:
    """torchrun, with a copy of this project for rank 3 in which one comment differs."""
    copy = run_dir.parent / "other_code"
    for package in ("conf", "launch", "moe_train", "parallel"):
        shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
    with (copy / "moe_train" / "__init__.py").open("a") as file:
        file.write("# edited on one node\n")
    script = f'[ "$RANK" = 3 ] && export PYTHONPATH={copy} && cd {copy}; exec "$0" "$@"'
    return ["-m", "torch.distributed.run", "--nproc-per-node=4", "--no-python", "sh", "-c", script]
