"""run.log: log records and warnings of rank 0."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from moe_train.run import Callback, Metrics, Run
from moe_train.telemetry.patient_file import PatientFile

log = logging.getLogger("moe_train")


class _Handler(logging.Handler):
    """Appends records to a file. Python's own prints a traceback for each one that cannot be written."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._file = PatientFile(path)

    def emit(self, record: logging.LogRecord) -> None:
        self._file.write(self.format(record) + "\n")

    def close(self) -> None:
        self._file.close()
        super().close()


class RunLog(Callback):
    """Sends this project's log records from INFO on, those of libraries from WARNING on, and Python's warnings to
    run_dir/run.log. It starts when it is made, so that building and resuming are in it."""

    def __init__(self, run: Run) -> None:
        self._handler: _Handler | None = None
        if not run.is_main:
            return
        run.run_dir.mkdir(parents=True, exist_ok=True)
        self._handler = _Handler(run.run_dir / "run.log")
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logging.getLogger().addHandler(self._handler)
        log.setLevel(logging.INFO)
        logging.captureWarnings(True)

    def on_start(self, run: Run) -> None:
        if run.is_main:
            log.info(
                "%s on %d ranks (%s), from step %d to %d",
                run.cfg.model.name, run.layout.world_size, run.runtime, run.state.step, run.total_steps,
            )  # fmt: skip

    def on_evaluation_end(self, run: Run, metrics: Metrics) -> None:
        if run.is_main:
            log.info("step %d: validation loss %.4f", metrics["step"], metrics["valid_loss"])

    def on_event(self, run: Run, event: Metrics) -> None:
        """What is out of the ordinary is on the terminal too."""
        if run.is_main:
            facts = " ".join(f"{name}={value}" for name, value in event.items() if name not in ("step", "event"))
            line = f"step {event['step']}: {event['event']} {facts}"
            log.warning("%s", line)
            print(f"warning: {line}", file=sys.stderr, flush=True)

    def on_end(self, run: Run) -> None:
        if self._handler is None:
            return
        end = "done" if run.completed else f"stopped by {run.stopped_by or 'an error'}"
        log.info("%s at step %d", end, run.state.step)
        logging.captureWarnings(False)
        logging.getLogger().removeHandler(self._handler)
        self._handler.close()
        self._handler = None
