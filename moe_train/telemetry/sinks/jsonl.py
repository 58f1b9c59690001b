"""metrics.jsonl: what a run measured, one JSON object per line, each step once however often the run was resumed.

No torch import.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moe_train.files import atomic, untrusted
from moe_train.telemetry.patient_file import PatientFile, warn
from moe_train.telemetry.registry import Place
from moe_train.telemetry.sinks.base import RunEnd, RunFacts, Sink

NAME = "metrics.jsonl"


class MetricsFile(Sink):
    """Writes a line for each logged step, each evaluation and each event, at once. docs/metrics.md has the fields.

    JSON has no infinities and no NaN: such a value is null, and `non_finite` says what it was, as in
    `{"grad_norm": null, "non_finite": {"grad_norm": "inf"}}`.

    A run that continues at step N, or goes back to it, drops the lines after step N (going back keeps those of events);
    one that starts at step 0 starts a new file. An evaluation that the file has is not written again.
    """

    name = NAME
    place = Place.METRICS_FILE

    def __init__(self, run_dir: Path) -> None:
        super().__init__(run_dir)
        self._file: PatientFile | None = None
        self._last_evaluation = -1

    @property
    def failure(self) -> str:
        return self._file.failure if self._file is not None else ""

    def open(self, facts: RunFacts) -> None:
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self._begin(facts.first_step, keep=facts.first_step > 0, keep_events=False)

    def scalars(self, step: int, metrics: Mapping[str, Any]) -> None:
        if "valid_loss" in metrics:
            if step <= self._last_evaluation:
                return
            self._last_evaluation = step
        self._write({"step": step, **metrics})

    def event(self, event: Mapping[str, Any]) -> None:
        self._write(event)

    def rewind(self, step: int) -> None:
        if self._file is not None:
            self._file.close()
            self._begin(step, keep=True, keep_events=True)

    def flush(self) -> None:
        if self._file is not None:
            self._file.flush()

    def close(self, end: RunEnd) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, line: Mapping[str, Any]) -> None:
        if self._file is not None:
            self._file.write(encode(line))

    def _begin(self, step: int, keep: bool, keep_events: bool) -> None:
        """Append after the lines up to `step`."""
        path = self.run_dir / NAME
        self._last_evaluation = -1
        atomic.remove_leftovers(path)
        try:
            with atomic.replacement(path) as temporary, temporary.open("x", encoding="utf-8") as file:
                for line in read(path) if keep else ():
                    if line["step"] <= step or (keep_events and "event" in line):
                        file.write(encode(line))
                        if "valid_loss" in line:
                            self._last_evaluation = max(self._last_evaluation, line["step"])
        except OSError as error:
            warn(f"{path} keeps its lines after step {step}: {error.strerror or error}")
        self._file = PatientFile(path)


def encode(line: Mapping[str, Any]) -> str:
    """One line of strict JSON."""
    non_finite = {k: str(v) for k, v in line.items() if isinstance(v, float) and not math.isfinite(v)}
    values: dict[str, Any] = {k: None if k in non_finite else v for k, v in line.items()}
    if non_finite:
        values["non_finite"] = non_finite
    return json.dumps(values, allow_nan=False) + "\n"


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a metrics file, first to last, without those that a crash cut short; none if there is no file.

    One at a time, as a long run of a large model writes tens of GB.
    """
    if not path.exists():
        return
    for line in untrusted.read_json_lines(path):
        if isinstance(line.get("step"), int):
            yield line
