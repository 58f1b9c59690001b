"""run.log: log records and warnings of rank 0."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from moe_train.telemetry import registry
from moe_train.telemetry.patient_file import PatientFile
from moe_train.telemetry.registry import Place
from moe_train.telemetry.sinks.base import RunEnd, RunFacts, Sink, event_text

NAME = "run.log"
log = logging.getLogger("moe_train")


class _Handler(logging.Handler):
    """Appends records to a file. Python's own prints a traceback for each one that cannot be written."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.file = PatientFile(path)

    def emit(self, record: logging.LogRecord) -> None:
        self.file.write(self.format(record) + "\n")

    def flush(self) -> None:
        self.acquire()
        try:
            self.file.flush()
        finally:
            self.release()

    def close(self) -> None:
        self.file.close()
        super().close()


class RunLog(Sink):
    """Sends this project's log records from INFO on, those of libraries from WARNING on, and Python's warnings to
    run_dir/run.log. It starts when it is made, so that building and resuming are in it."""

    name = NAME
    place = Place.RUN_LOG

    def __init__(self, run_dir: Path) -> None:
        super().__init__(run_dir)
        with suppress(OSError):  # the file reports it, and is made later
            run_dir.mkdir(parents=True, exist_ok=True)
        self._handler: _Handler | None = _Handler(run_dir / NAME)
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logging.getLogger().addHandler(self._handler)
        log.setLevel(logging.INFO)
        logging.captureWarnings(True)

    @property
    def failure(self) -> str:
        return self._handler.file.failure if self._handler is not None else ""

    def open(self, facts: RunFacts) -> None:
        log.info(
            "%s on %d ranks (%s), from step %d to %d",
            facts.model, facts.ranks, facts.runtime, facts.first_step, facts.total_steps,
        )  # fmt: skip

    def scalars(self, step: int, metrics: Mapping[str, Any]) -> None:
        for name, value in metrics.items():
            row = registry.metric(name)
            log.info("step %d: %s %s", step, row.label_of(name), row.text(value))

    def event(self, event: Mapping[str, Any]) -> None:
        log.warning("%s", event_text(event))

    def flush(self) -> None:
        if self._handler is not None:
            self._handler.flush()

    def close(self, end: RunEnd) -> None:
        if self._handler is None:
            return
        how = "done" if end.completed else f"stopped by {end.stopped_by or 'an error'}"
        log.info("%s at step %d", how, end.step)
        logging.captureWarnings(False)
        logging.getLogger().removeHandler(self._handler)
        self._handler.close()
        self._handler = None
