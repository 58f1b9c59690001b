"""metrics.jsonl: what a run measured, one JSON object a line, each step once however often the run was resumed."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from moe_train.checkpoint.collective import warn
from moe_train.files import untrusted
from moe_train.run import Callback, Metrics, Run
from moe_train.telemetry.patient_file import PatientFile
from moe_train.telemetry.throughput import is_logged

NAME = "metrics.jsonl"
_LAST = "expert_load"  # the longest value, at the end of its line


class MetricsFile(Callback):
    """Writes a line for each logged step and each evaluation, flushed at once. A disk that is full or read-only does
    not end the run (`PatientFile`).

    Training lines: `step`, `tokens` (consumed so far), `lm_loss` (nats a token, before any auxiliary loss), `grad_norm`
    (before clipping), `lr`, `global_batch_size` (sequences), `step_time_s`, `tokens_per_s` (all ranks),
    `tflops_per_rank`, `mfu` (0 to 1, null where the peak is not known), `memory_peak_bytes` (fullest rank), balance
    losses and `mtp_loss` where the model has them, `skipped` where an update was left out (`bad_step` says why, or
    fp16 overflowed), `expert_load` (tokens of each expert in this step, one list for each MoE layer,
    multi-token-prediction layers last).
    Evaluation lines: `step`, `tokens`, `valid_loss`.
    Lines of events: `step`, `event` and what is known of it.

    JSON has no infinities and no NaN: such a value is null, and `non_finite` says what it was, as in
    `{"grad_norm": null, "non_finite": {"grad_norm": "inf"}}`.

    A run that continues at step N, or goes back to it, drops the lines after step N (going back keeps those of events);
    one that starts at step 0 starts a new file.
    """

    def __init__(self) -> None:
        self._file: PatientFile | None = None
        self._last_evaluation = -1

    def on_start(self, run: Run) -> None:
        if not run.is_main:
            return
        run.run_dir.mkdir(parents=True, exist_ok=True)
        self._open(run, keep=run.state.step > 0)

    def _open(self, run: Run, keep: bool, events: bool = False) -> None:
        path = run.run_dir / NAME
        self._last_evaluation = -1
        part = path.with_name(NAME + ".part")
        try:
            with part.open("w", encoding="utf-8") as file:
                for line in read(path) if keep else ():
                    if line["step"] <= run.state.step or (events and "event" in line):
                        file.write(encode(line))
                        if "valid_loss" in line:
                            self._last_evaluation = max(self._last_evaluation, line["step"])
            os.replace(part, path)
        except OSError as error:
            with suppress(OSError):
                part.unlink()
            warn(f"{path} keeps its lines after step {run.state.step}: {error.strerror or error}")
        self._file = PatientFile(path)

    def on_step_end(self, run: Run, metrics: Metrics) -> None:
        if self._file is not None and is_logged(run):
            self._file.write(encode(training_line(run, metrics)))

    def on_evaluation_end(self, run: Run, metrics: Metrics) -> None:
        if self._file is not None and metrics["step"] > self._last_evaluation:
            self._last_evaluation = metrics["step"]
            self._file.write(encode(metrics))

    def on_event(self, run: Run, event: Metrics) -> None:
        if self._file is not None:
            self._file.write(encode(event))

    def on_rollback(self, run: Run) -> None:
        if self._file is not None:
            self._file.close()
            self._open(run, keep=True, events=True)

    def on_end(self, run: Run) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def training_line(run: Run, metrics: Metrics) -> Metrics:
    """What is written about the step just done, in the order of the file."""
    line: Metrics = {"step": run.state.step, "tokens": run.state.consumed_tokens}
    line |= {name: metrics[name] for name in ("lm_loss", "grad_norm", "lr")}
    line["global_batch_size"] = run.cfg.batch.global_batch_size
    line |= {name: value for name, value in metrics.items() if name not in line and name != _LAST}
    if _LAST in metrics:
        line[_LAST] = list(moe_layers(run, metrics[_LAST]).values())
    return line


def moe_layers(run: Run, load: list[list[int]]) -> dict[int, list[int]]:
    """Tokens of each expert by the number of the layer, from 1; multi-token-prediction layers count on. `load` has a
    row for every layer, dense ones included."""
    pattern = run.cfg.model.moe_layer_pattern
    pattern = pattern + pattern[-1:] * run.cfg.model.mtp_num_layers
    return {i: row for i, (row, moe) in enumerate(zip(load, pattern, strict=True), 1) if moe}


def encode(metrics: Metrics) -> str:
    """One line of strict JSON."""
    non_finite = {k: str(v) for k, v in metrics.items() if isinstance(v, float) and not math.isfinite(v)}
    line: dict[str, Any] = {k: None if k in non_finite else v for k, v in metrics.items()}
    if non_finite:
        line["non_finite"] = non_finite
    return json.dumps(line, allow_nan=False) + "\n"


def read(path: Path) -> Iterator[Metrics]:
    """The lines of a metrics file, first to last, without those that a crash cut short; none where there is no file.

    One at a time, as a long run of a large model writes tens of GB.
    """
    if not path.exists():
        return
    for line in untrusted.read_json_lines(path):
        if isinstance(line.get("step"), int):
            yield line
