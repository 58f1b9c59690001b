"""Training commands that a fault meets, and what is seen of them from outside."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SMALL = (
    "model=tiny", "model.num_layers=2", "model.hidden_size=64", "model.ffn_hidden_size=96",
    "model.moe_ffn_hidden_size=32", "model.num_experts=4", "model.router_num_groups=0", "model.router_topk_groups=0",
    "model.topk=2", "model.mtp_num_layers=0", "model.vocab_size=512", "runtime=cpu", "batch.global_batch_size=8",
    "train.seq_length=32", "train.eval_batches=0", "schedule.warmup_steps=2", "telemetry.tensorboard=false",
    "telemetry.peak_tflops=1", "resilience.straggler_interval_steps=0",
)  # fmt: skip


@dataclass
class Seen:
    """What one command showed."""

    code: int = -1
    began: float = 0.0
    seconds: float = 0.0
    injected: float = 0.0
    """When a fault from outside happened, as time.monotonic."""
    lines: list[tuple[float, str]] = field(default_factory=list)
    """(time, line) of both streams; times are of time.monotonic."""

    def first(self, pattern: str, after: float = 0.0) -> tuple[float, re.Match[str]] | None:
        """The first line after a time in which `pattern` is found."""
        for at, line in self.lines:
            if at > after and (match := re.search(pattern, line)):
                return at, match
        return None


def data_overrides(directory: Path) -> tuple[str, ...]:
    """A small dataset of this project's own documentation, made by the first command that uses it."""
    shutil.copytree(ROOT / "docs", directory.parent / "text", dirs_exist_ok=True)  # nobody changes the copy
    return (
        "data=text", f"data.path={directory.parent / 'text'}", f"data.dir={directory}", "data.tokenizer_vocab_size=512",
        "data.prepare_workers=1",
    )  # fmt: skip


def train(
    run_dir: Path, overrides: Sequence[str],
    during: Callable[[subprocess.Popen[str], Seen, Path], None] | None = None,
    environment: dict[str, str] | None = None, starter: Sequence[str] | None = None, timeout_s: float = 900,
) -> Seen:  # fmt: skip
    """Run moe-train to its end; `during` may act on the process meanwhile, in a thread. `starter`: words for Python
    that start the ranks."""
    words = [sys.executable, "-m", "launch.main", *SMALL, *overrides, f"run_dir={run_dir}"]
    if starter:
        words = [sys.executable, *starter, *words]
    seen = Seen(began=time.monotonic())
    process = subprocess.Popen(
        words, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        env=dict(os.environ) | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"} | (environment or {}),
    )  # fmt: skip
    acting = threading.Thread(target=during, args=(process, seen, run_dir), daemon=True) if during else None
    if acting:
        acting.start()
    limit = threading.Timer(timeout_s, os.killpg, (process.pid, signal.SIGKILL))
    limit.start()
    for line in process.stdout or ():
        seen.lines.append((time.monotonic(), line.rstrip()))
    seen.code = process.wait()
    limit.cancel()
    if acting:
        acting.join(60)
    seen.seconds = time.monotonic() - seen.began
    return seen


def losses(run_dir: Path) -> dict[int, float | None]:
    """Loss by step."""
    return {line["step"]: line["lm_loss"] for line in _metrics(run_dir) if "lm_loss" in line}


def events(run_dir: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl about events."""
    return [line for line in _metrics(run_dir) if "event" in line]


def _metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl; none where nothing was trained."""
    file = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def injected_at(run_dir: Path) -> float | None:
    """When the first fault happened, as time.monotonic; None where none has."""
    files = list((run_dir / "injected").glob("*"))
    if not files:
        return None
    return min(file.stat().st_mtime for file in files) - time.time() + time.monotonic()
