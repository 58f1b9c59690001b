"""Watchdog: a thread that detects a hang of its rank, reports where every rank is, and ends the process.

It uses no collective: ranks exchange heartbeats through files in run_dir/heartbeats. All times are monotonic, so a jump
of the wall clock has no effect.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import IO

from moe_train.files import atomic, untrusted
from parallel.exit_codes import ExitCode

log = logging.getLogger(__name__)

VERDICT = "hung.txt"
"""File in run_dir that says which ranks made no progress, written by every rank that ends itself."""

_POLL_S = 0.1
_WAITS = ("/torch/distributed/", "/megatron/core/distributed/", "/p2p_communication.py")
"""Where Python code waits for other ranks."""
_OURS = ("/moe_train/", "/parallel/", "/launch/", "/tests/")


class ProgressMarker:
    """Position of a rank in its step. Code that makes progress calls `mark`, which is cheap."""

    def __init__(self) -> None:
        self.step, self.count, self.place = 0, 0, "start"

    def mark(self, step: int, place: str) -> None:
        """Record progress: the rank starts `place` of the step after `step`."""
        self.step, self.place = step, place
        self.count += 1


@dataclass
class Heartbeat:
    """Last state that a rank wrote."""

    rank: int
    host: str
    pid: int
    step: int
    """Steps done."""
    count: int
    """Progress since the start."""
    place: str
    stuck: bool
    waits: bool
    """Whether its main thread waits for another rank."""
    at: str
    """Function and line of its main thread, where it is stuck."""


class Watch(threading.Thread):
    """Watches the main thread of this process.

    Args:
        world_size: ranks of the run; files of others are of an earlier start with more.
        limit_s: timeout without progress, read at every sample; 0 means none.
        counts: whether time now belongs to steps, for `busy_fraction`.
    """

    def __init__(
        self, pulse: ProgressMarker, run_dir: Path, rank: int, world_size: int,
        limit_s: Callable[[], float], counts: Callable[[], bool],
    ) -> None:  # fmt: skip
        super().__init__(name="watchdog", daemon=True)
        self.pulse, self.run_dir, self.rank, self._limit_s, self._counts = pulse, run_dir, rank, limit_s, counts
        self._world_size = world_size
        self._end = threading.Event()
        self._samples = self._waiting = 0
        self._main = threading.main_thread().ident or 0
        self._stacks = run_dir / "logs" / f"hang_rank_{rank}.txt"

    def start(self) -> None:
        """Write the first heartbeat, and start."""
        with contextlib.suppress(OSError):  # what is written there says so
            (self.run_dir / "heartbeats").mkdir(parents=True, exist_ok=True)
            self._stacks.parent.mkdir(parents=True, exist_ok=True)
        self._write(self._state(stuck=False))
        super().start()

    def stop(self) -> None:
        """End the thread."""
        self._end.set()
        self.join()
        faulthandler.cancel_dump_traceback_later()

    def busy_fraction(self) -> float | None:
        """Fraction of the samples since the last call without waiting for another rank; None without samples."""
        samples, waiting = self._samples, self._waiting
        self._samples = self._waiting = 0
        return 1 - waiting / samples if samples else None

    def run(self) -> None:
        """Sample until `stop`."""
        seen, silent_s, before = self.pulse.count, 0.0, time.monotonic()
        written, armed, limit_before = 0, 0.0, 0.0
        with _opened(self._stacks) as stacks:
            while not self._end.wait(_POLL_S):
                now, limit = time.monotonic(), self._limit_s()
                self._sample()
                # A process that was suspended as a whole, this thread included, has not been silent for so long.
                silent_s += min(now - before, max(limit / 4, 2 * _POLL_S))
                before = now
                if self.pulse.count != seen or limit < limit_before:  # what may take longer has ended: a new start
                    seen, silent_s = self.pulse.count, 0.0
                changed, limit_before = limit != limit_before, limit
                if not limit:
                    silent_s = 0.0  # a limit that begins later does not count what was before
                    continue
                if changed or now - armed > limit / 4:
                    # This thread needs Python's lock. If native code keeps it, a thread of faulthandler's does without.
                    faulthandler.dump_traceback_later(2 * limit + 60, exit=True, file=stacks)
                    armed = now
                    if self.pulse.step != written:
                        written = self.pulse.step
                        self._write(self._state(stuck=False))
                if silent_s > limit:
                    self._give_up(silent_s, min(limit / 4, 30.0), stacks.fileno())
        self._remove_empty()

    def _sample(self) -> None:
        if self._counts():
            self._samples += 1
            self._waiting += waits(sys._current_frames().get(self._main))

    def _give_up(self, silent_s: float, grace_s: float, stacks: int) -> None:
        try:
            self._report(silent_s, grace_s, stacks)
        finally:  # also where a full disk takes nothing of it
            os._exit(ExitCode.HUNG)

    def _report(self, silent_s: float, grace_s: float, stacks: int) -> None:
        mine = self._state(stuck=True)
        head = f"rank {self.rank} made no progress for {silent_s:.1f} s in step {mine.step + 1}, {mine.place}"
        os.write(stacks, f"--- {head}\n".encode())
        faulthandler.dump_traceback(stacks, all_threads=True)
        self._write(mine)
        time.sleep(grace_s)  # the others notice too
        culprits = verdict([heartbeat for heartbeat in read(self.run_dir) if heartbeat.rank < self._world_size])
        text = f"{head}; {'; '.join(culprits)}; stacks in {self._stacks}"
        print(f"error: {text}", file=sys.stderr, flush=True)
        log.error("%s", text)
        atomic.write_text(self.run_dir / VERDICT, "\n".join(culprits) + "\n")
        sys.stdout.flush()

    def _state(self, stuck: bool) -> Heartbeat:
        frame, pulse = sys._current_frames().get(self._main), self.pulse
        return Heartbeat(
            rank=self.rank,
            host=socket.gethostname(),
            pid=os.getpid(),
            step=pulse.step,
            count=pulse.count,
            place=pulse.place,
            stuck=stuck,
            waits=waits(frame),
            at=where(frame),
        )

    def _write(self, heartbeat: Heartbeat) -> None:
        path = self.run_dir / "heartbeats" / f"rank_{self.rank}.json"
        try:
            atomic.write_text(path, json.dumps(asdict(heartbeat)))
        except OSError as error:  # a full disk must not end a run
            log.warning("heartbeat: %s", error)

    def _remove_empty(self) -> None:
        with contextlib.suppress(OSError):
            if self._stacks.stat().st_size == 0:
                self._stacks.unlink()


def _opened(stacks: Path) -> IO[str]:
    """The file for stacks, or the standard error where a full or read-only run_dir takes none."""
    try:
        return stacks.open("a", encoding="utf-8")
    except OSError as error:
        log.warning("stacks of a hang go to the standard error: %s", error)
        return os.fdopen(os.dup(2), "w")


def waits(frame: FrameType | None) -> bool:
    """Whether the innermost function of a stack waits for another rank."""
    return frame is not None and any(part in frame.f_code.co_filename for part in _WAITS)


def where(frame: FrameType | None) -> str:
    """Innermost function of a stack, and innermost of this project's code."""
    if frame is None:
        return "ended"
    inner = f"{frame.f_code.co_name} ({_short(frame)})"
    while frame is not None and not any(part in frame.f_code.co_filename for part in _OURS):
        frame = frame.f_back
    ours = "" if frame is None else f"{frame.f_code.co_name} ({_short(frame)})"
    return inner if ours in ("", inner) else f"{inner} from {ours}"


def _short(frame: FrameType) -> str:
    return f"{'/'.join(Path(frame.f_code.co_filename).parts[-2:])}:{frame.f_lineno}"


def read(run_dir: Path) -> list[Heartbeat]:
    """Heartbeats of a run, by rank. Files that cannot be read are left out."""
    heartbeats = []
    for path in (run_dir / "heartbeats").glob("rank_*.json"):
        try:
            heartbeats.append(untrusted.read_record(path, Heartbeat))
        except (OSError, ValueError):
            continue
    return sorted(heartbeats, key=lambda heartbeat: heartbeat.rank)


def verdict(ranks: list[Heartbeat]) -> list[str]:
    """Which of the ranks of a hung run keep the others waiting, a line each: the silent ones, else those that do not
    wait for another, else those that are furthest behind; all of them if none differs."""
    if silent := [r for r in ranks if not r.stuck]:
        return [f"rank {r.rank} ({r.host}) sends no heartbeat, last seen after step {r.step}" for r in silent]
    least = min(((r.step, r.count) for r in ranks), default=(0, 0))
    culprits = [r for r in ranks if not r.waits] or [r for r in ranks if (r.step, r.count) == least]
    return [f"rank {r.rank} ({r.host}) hangs in step {r.step + 1}, {r.place}, in {r.at}" for r in culprits]
