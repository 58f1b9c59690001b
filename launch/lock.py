"""One run at a time writes to a run directory: run_dir/run.lock names its host, job and process. No torch import.

A run that ends removes its lock. One that was killed leaves it, and the next run takes it over:

* on the same machine at once, when the process is gone;
* in a later start of the same job at once;
* on another machine when Slurm no longer knows the job, or when no heartbeat came for `launcher.lock_timeout_s`.

The lock appears by `link(2)`, which is atomic on NFS too. Its heartbeat is that of `moe_train.files.locks`.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from moe_train.config.schema import Config
from moe_train.files import locks
from parallel.errors import ConfigError, LaunchError

NAME = "run.lock"
_BEATS = 6  # in launcher.lock_timeout_s
_POLL_S = 0.5
_SLURM_JOB = "Slurm job "
_OVER = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED",
         "TIMEOUT")  # fmt: skip
"""States of a Slurm job that has ended."""


class InUseError(ConfigError):
    """Another run writes to the directory. Starting again would not change that."""


@dataclass(frozen=True)
class Owner:
    """Who holds a lock."""

    host: str
    kernel: str
    """Boot and process namespace: only there does `pid` mean this process."""
    pid: int
    started: str
    """When the process started, in the kernel's words: process ids are used again."""
    job: str
    attempt: int
    """Starts of the job before this one."""
    token: str
    cluster: str = ""
    """Slurm's name of the cluster that numbers the job; "" where that is not known."""

    def __str__(self) -> str:
        process = locks.name_of(self.pid, self.host)
        return f"{process} ({locks.printable(self.job)})" if self.job else process


class Lock:
    """A lock that this process holds, with a thread for its heartbeat."""

    def __init__(self, path: Path, owner: Owner, timeout_s: float, lost: Callable[[str], None]) -> None:
        self.path, self.owner, self._lost = path, owner, lost
        try:
            self._heartbeat = locks.LockHeartbeat(path, timeout_s / _BEATS, _POLL_S, self._is_ours, self._report_lost)
        except RuntimeError as error:
            self._remove()
            raise LaunchError(f"the lock of run_dir needs a thread: {error}", "raise ulimit -u and ulimit -v") from None

    def release(self) -> None:
        """Let another run have the directory."""
        self._heartbeat.end()
        self._remove()

    def _remove(self) -> None:
        with contextlib.suppress(OSError):
            if self._is_ours():
                self.path.unlink()

    def _is_ours(self) -> bool:
        return _owner(self.path) == self.owner

    def _report_lost(self) -> None:
        there = None
        with contextlib.suppress(OSError):
            there = _owner(self.path)
        self._lost(f"run_dir={self.path.parent} was taken over by {there or 'a user who removed its lock'}")


_locks: list[Lock] = []


@contextlib.contextmanager
def held(cfg: Config, lost: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold the lock of `cfg.run_dir` inside the block. `lost` is called where another run takes it.

    Raises:
        InUseError: another run holds it.
        LaunchError: run_dir cannot be written.
    """
    lock = acquire(Path(cfg.run_dir), cfg.launcher.lock_timeout_s, lost or _end_this_process)
    _locks.append(lock)
    try:
        yield
    finally:
        _locks.remove(lock)
        lock.release()


def release_all() -> None:
    """Release what this process holds, before it ends without unwinding."""
    for lock in _locks:
        lock.release()


def _end_this_process(why: str) -> None:
    print(f"error: {why}; this run ends, so that not two write there", file=sys.stderr, flush=True)
    # A run in the background of a script may ignore SIGTERM. Two writers are worse than a kill.
    ignored = signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    os.kill(os.getpid(), signal.SIGKILL if ignored else signal.SIGTERM)


def acquire(run_dir: Path, timeout_s: float, lost: Callable[[str], None]) -> Lock:
    """Take the lock of `run_dir`, waiting at most `timeout_s` for one that was left behind on another machine.

    Raises:
        InUseError: another run holds it.
        LaunchError: run_dir cannot be written.
    """
    path, me = run_dir / NAME, _me()
    watch = _Watched(path, me, timeout_s)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        while not _create(path, me):
            owner = _owner(path)
            if owner is None:
                if not path.exists():
                    continue
                owner = Owner("an unknown host", "", 0, "", "", 0, "")  # damaged: its heartbeat tells
            if why_gone := watch.why_gone(owner):
                _remove_stale(path, owner)
                print(f"warning: run_dir={run_dir} was left locked by {owner}: {why_gone}", file=sys.stderr, flush=True)
            else:
                time.sleep(_POLL_S)
    except OSError as error:
        raise LaunchError(f"run_dir={run_dir} cannot be written: {error.strerror}", "set run_dir=PATH") from error
    return Lock(path, me, timeout_s, lost)


def refuse_live(cfg: Config) -> None:
    """Raise InUseError where a run here, or a job that Slurm knows, holds the lock of run_dir. Does not wait.

    Raises:
        LaunchError: the lock cannot be read.
    """
    path = Path(cfg.run_dir, NAME)
    try:
        owner = _owner(path)
    except OSError as error:
        cause = f"{path} cannot be read: {error.strerror}"
        raise LaunchError(cause, "make it readable, or set run_dir=PATH") from error
    if owner is not None and _state(owner, _me())[0] == "lives":
        raise _in_use(path, owner)


class _Watched:
    """What is known of the lock that another process holds."""

    def __init__(self, path: Path, me: Owner, timeout_s: float) -> None:
        self._path, self._me, self._timeout_s = path, me, timeout_s
        self._watch = locks.LockWatch(path)

    def why_gone(self, owner: Owner) -> str:
        """Why `owner` no longer runs; "" while that is not known.

        Raises:
            InUseError: it runs.
        """
        state, why = _state(owner, self._me)
        if state == "gone":
            return why
        same_job = bool(owner.job) and (owner.job, owner.cluster) == (self._me.job, self._me.cluster)
        if state == "lives" and not same_job:
            raise _in_use(self._path, owner)
        is_first = self._watch.is_new
        try:
            beats = self._watch.look()
        except OSError:
            return ""
        if is_first:
            print(f"{self._path} is held by {owner}: waiting for a heartbeat, {self._timeout_s:g} s at most",
                  file=sys.stderr, flush=True)  # fmt: skip
        if beats and not same_job:
            raise _in_use(self._path, owner)
        waited_s = self._watch.watched_s
        if waited_s < self._timeout_s:
            return ""
        if state == "lives":  # an earlier start of this job that does not end
            raise LaunchError(f"{owner} still writes to run_dir={self._path.parent}", "see why it does not end")
        return f"no heartbeat for {waited_s:.0f} s (launcher.lock_timeout_s)"


def _state(owner: Owner, me: Owner) -> tuple[str, str]:
    """("lives" | "gone" | "unknown", why)."""
    if owner.kernel and owner.kernel == me.kernel:
        if owner.pid and _started(owner.pid) == owner.started:
            return "lives", ""
        return "gone", "its process has ended"
    if owner.job and (owner.job, owner.cluster) == (me.job, me.cluster) and owner.attempt < me.attempt:
        return "gone", "it was an earlier start of this job"
    # Two clusters that share a storage number their jobs alike, and the squeue of one knows nothing of the other's.
    same_cluster = owner.cluster == me.cluster or not (owner.cluster and me.cluster)
    is_another_job = owner.job.startswith(_SLURM_JOB) and owner.job != me.job
    number = owner.job.removeprefix(_SLURM_JOB)
    if is_another_job and number.isascii() and number.isdigit() and same_cluster:
        return _job_state(number)
    return "unknown", ""


def _job_state(job: str) -> tuple[str, str]:
    if shutil.which("squeue") is None:
        return "unknown", ""
    words = ["squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.SubprocessError):
        return "unknown", ""
    if done.returncode and "Invalid job id" not in done.stderr:
        return "unknown", ""
    states = set(done.stdout.split())
    return ("gone", "its job has ended") if states <= set(_OVER) else ("lives", "")


def _in_use(path: Path, owner: Owner) -> InUseError:
    with contextlib.suppress(OSError):
        age_s = max(0.0, time.time() - path.stat().st_mtime)
        return InUseError(
            f"run_dir={path.parent} is in use by {owner}, last heartbeat {age_s:.0f} s ago",
            f"use another run_dir, or end that run; if it has ended, remove {path}",
        )
    return InUseError(f"run_dir={path.parent} is in use by {owner}", "use another run_dir, or try again")


def _create(path: Path, me: Owner) -> bool:
    """Whether the lock is ours now."""
    part = path.with_name(f".{NAME}.{me.token}")
    try:
        part.write_text(json.dumps(asdict(me)) + "\n", encoding="utf-8")
        try:
            os.link(part, path)
        except FileExistsError:
            return False
        except OSError:
            if part.stat().st_nlink == 2:  # NFS: the answer was lost, and not the link
                return True
            return _create_exclusively(path, part.read_text(encoding="utf-8"))
        return True
    finally:
        part.unlink(missing_ok=True)


def _create_exclusively(path: Path, text: str) -> bool:
    """For a file system without links."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        return False
    return True


def _remove_stale(path: Path, owner: Owner) -> None:
    """Remove the lock of `owner`, and not one that another process has put in its place meanwhile."""
    aside = path.with_name(f".{NAME}.{secrets.token_hex(8)}.stale")
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, aside)
        there = _owner(aside)
        if there is not None and there.token != owner.token:
            with contextlib.suppress(FileExistsError):
                os.link(aside, path)
        aside.unlink()


def _owner(path: Path) -> Owner | None:
    """Who holds the lock; None where there is none, or it is damaged."""
    return locks.read_owner(path, Owner)


def _me() -> Owner:
    job = attempt = ""
    if number := os.environ.get("SLURM_JOB_ID"):
        job, attempt = f"{_SLURM_JOB}{number}", os.environ.get("SLURM_RESTART_COUNT", "")
    elif (name := os.environ.get("TORCHELASTIC_RUN_ID", "none")) != "none":
        job = f"torchrun {name}"
    starts = (
        int(text) if text.isdigit() else 0 for text in (attempt, os.environ.get("TORCHELASTIC_RESTART_COUNT", ""))
    )
    first, second = starts
    pid, host = os.getpid(), os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    cluster = os.environ.get("SLURM_CLUSTER_NAME", "")
    return Owner(host, _kernel(), pid, _started(pid), job, 10_000 * first + second, secrets.token_hex(8), cluster)


def _kernel() -> str:
    """The same for two processes that see each other's process ids, and for no others."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux
        return f"{socket.gethostname()} {sys.platform}"


def _started(pid: int) -> str:
    """When a process started; "" where there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except FileNotFoundError:
        if sys.platform == "linux":
            return ""
    except OSError:
        return ""
    else:
        return "" if fields[0] in "ZX" else fields[19]
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:  # it runs, as another user
        return "running"
    return "running"
